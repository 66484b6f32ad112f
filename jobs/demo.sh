# The quickstart, typed as a user would: start the services, fine-tune through Ray, ask the result.
set -eu

s2ft up
set -a
eval "$(s2ft status --env)"
set +a

ray job submit --working-dir . -- python jobs/finetune.py --config jobs/configs/quickstart.yaml

echo
echo "The adapter, loaded from the model registry by its alias in a fresh process:"
echo
python jobs/evaluate.py acme.support-bot@champion \
    --data jobs/configs/data/tickets_test.jsonl jobs/configs/data/base_skills_test.jsonl

cat <<END

Still up, on this machine alone:
    MLflow          $MLFLOW_TRACKING_URI
    Ray dashboard   $RAY_API_SERVER_ADDRESS   (asks for the token: cat $RAY_AUTH_TOKEN_PATH)
Ask the adapter yourself, in this folder:
    export MLFLOW_TRACKING_URI=$MLFLOW_TRACKING_URI
    .venv/bin/python -c 'import mlflow; print(mlflow.pyfunc.load_model("models:/acme.support-bot@champion").predict(["My kettle arrived broken, order 4711."]))'
End it all:
    .venv/bin/s2ft down
END
