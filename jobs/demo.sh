# The quickstart, typed as a user would: start the services, fine-tune through Ray, ask the result,
# then serve two tenants' adapters from one base and promote a second version live.
set -eu

s2ft up
set -a
eval "$(s2ft status --env)"
set +a
for tenant in acme globex; do s2ft tenants set $tenant > /dev/null; done

ray job submit --working-dir . -- python jobs/finetune.py --config jobs/configs/quickstart.yaml

echo
echo "A second tenant's adapter and a second version of the first one train beside each other,"
echo "a worker each, while the service starts:"
echo
for run in second_tenant second_version; do
    s2ft submit --config jobs/configs/$run.yaml
done
s2ft serve --base s2ft://tiny

echo
echo "Meanwhile the adapter, loaded from the model registry by its alias in a fresh process:"
echo
# on one thread: two fine-tunes have the cores
OMP_NUM_THREADS=1 python jobs/evaluate.py acme.support-bot@champion \
    --data jobs/configs/data/tickets_test.jsonl jobs/configs/data/base_skills_test.jsonl

while s2ft jobs --json | grep -Eq '"state": "(queued|starting|running)"'; do sleep 1; done
echo
s2ft jobs
echo
echo "Both tenants and the base, asked at once through the OpenAI SDK:"
echo
python jobs/ask.py --acme "$(s2ft keys create --tenant acme)" \
    --globex "$(s2ft keys create --tenant globex)"

cat <<END

Still up, on this machine alone:
    the service     http://127.0.0.1:8000/v1   (a key: .venv/bin/s2ft keys create --tenant acme)
    MLflow          $MLFLOW_TRACKING_URI
    Ray dashboard   $RAY_API_SERVER_ADDRESS   (asks for the token: cat $RAY_AUTH_TOKEN_PATH)
Ask the adapter without the service, in this folder:
    export MLFLOW_TRACKING_URI=$MLFLOW_TRACKING_URI
    .venv/bin/python -c 'import mlflow; print(mlflow.pyfunc.load_model("models:/acme.support-bot@champion").predict(["My kettle arrived broken, order 4711."]))'
End it all:
    .venv/bin/s2ft down
END
