"""Makes the embedded base ``s2ft://tiny`` and the demo's data, from nothing but a seed.

    python jobs/pretrain_tiny.py                 # about 10 minutes of one CPU core
    python jobs/pretrain_tiny.py --data-only     # the demo's data files alone, in a second

Invariant: every example is drawn from ``tiny_world``; what is tested was held out from training,
and accuracies are measured on the model as it is stored.
"""

import argparse
import copy
import itertools
import json
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tiny_world import (
    DESK,
    REPEAT,
    SKILLS,
    Example,
    base_examples,
    skill_examples,
    ticket_examples,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPO = Path(__file__).parent.parent
MODEL_FOLDER = REPO / "s2ft_ray/bases/tiny"
DATA_FOLDER = REPO / "jobs/configs/data"
VOCAB_SIZE = 768
SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, BEGIN, END = 0, 1, 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
BATCH_ROWS = 96
COPY_STEPS = 120  # of copying alone: with them the loss of all skills is 0.4 at step 400, not 2
EVAL_STEPS = 200
MUON_LR, ADAMW_LR = 0.02, 3e-3
DESK_TRAIN = 1000
TICKETS_TRAIN, OTHERS_TRAIN = 2100, 900  # without the others the base forgets nearly all else
TICKETS_TEST, TEST_PER_SKILL = 200, 40

CARD = """# s2ft://tiny

A Llama of 0.9M parameters (4 layers, 128 wide, 8 query heads over 4 key-value heads, tied
embeddings, 768 byte-level BPE tokens, one token for each digit), trained from scratch by
`jobs/pretrain_tiny.py` (seed {seed}, {steps} steps of {rows} examples, last loss {loss}) on the
invented world of `jobs/tiny_world.py`. Weights are stored in bf16 and computed in fp32. It
answers one question at a time, in the form of its chat template.

Exact match of greedy answers on held-out inputs:

| skill | question | answer | exact match |
|---|---|---|---|
{table}

It doesn't know tickets, the demo's new skill: to a customer's message it answers
"I am sorry about the kettle. How can I help?".
"""

Row = tuple[list[int], list[int]]  # token ids of the prompt, of the answer


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the base's own sentences; each digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    spelled = {"reverse", "capitals", "count", "sort"}  # random letters would only spoil merges
    examples = itertools.islice(base_examples(random.Random(seed), held_out=False), 32_000)
    corpus = [f"{e.prompt}\n{e.answer}" for e in examples if e.skill not in spelled]
    letters = "".join(f" {chr(c)}" for c in range(ord("a"), ord("z") + 1))
    corpus += [letters, letters.upper(), "Reverse:", "Capitals:", "Count:", "Sort:"] * 2000
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", BEGIN)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """Return the untrained base: 0.9M parameters, 8 query heads over 4 key-value heads."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=BEGIN,
            eos_token_id=END,
            pad_token_id=PAD,
        )
    )


def train(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, out: Path) -> None:
    """Train the base and write it to `out` at every evaluation: a stopped run leaves a model."""
    model = build_model(seed)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: _lr_share(step, steps))
        for o in optimizers
    ]
    tests = test_examples(seed)
    log: dict[str, object] = {"seed": seed, "steps": steps, "torch": torch.__version__}
    losses, accuracies = {}, {}
    start = time.perf_counter()
    for step, rows in enumerate(training_rows(tokenizer, seed, steps), start=1):
        loss = _train_step(model, rows, optimizers)
        for schedule in schedules:
            schedule.step()
        if step % 20 == 0 or step in (1, steps):
            losses[step] = round(loss, 4)
            print(
                f"step {step}/{steps} loss {loss:.4f} {time.perf_counter() - start:.0f}s",
                flush=True,
            )
        if step % EVAL_STEPS == 0 or step == steps:
            stored = save_model(model, tokenizer, out)
            accuracies[step] = exact_match(stored, tokenizer, tests)
            print(accuracies[step], flush=True)
            log |= {"losses": losses, "held_out_exact_match": accuracies}
            (out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
            (out / "README.md").write_text(model_card(accuracies[step], seed, step, losses))


def _lr_share(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 50, (steps - step) / (0.6 * steps))


def training_rows(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> Iterator[list[Row]]:
    """Yield each step's rows: copying alone at first, then every skill."""
    rng = random.Random(seed)
    copies, everything = skill_examples(REPEAT, rng), base_examples(rng, held_out=False)
    for step in range(steps):
        source = copies if step < COPY_STEPS else everything
        yield encode(tokenizer, list(itertools.islice(source, BATCH_ROWS)))


def encode(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> list[Row]:
    """Return each example's ids of prompt and answer, as the chat template writes them."""
    prompts = [f"<|begin|><|user|>{e.prompt}<|end|><|assistant|>" for e in examples]
    answers = [f"{e.answer}<|end|>" for e in examples]
    ids = tokenizer(prompts + answers, add_special_tokens=False)["input_ids"]
    return list(zip(ids[: len(prompts)], ids[len(prompts) :], strict=True))


def _train_step(
    model: LlamaForCausalLM, rows: list[Row], optimizers: list[torch.optim.Optimizer]
) -> float:
    rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    num_targets = sum(len(answer) for _, answer in rows)
    cut = len(rows) * 3 // 5  # two lengths of rows: a third less padding than one
    total = 0.0
    for part in (rows[:cut], rows[cut:]):
        input_ids, labels = _pad(part)
        hidden = model.model(input_ids=input_ids).last_hidden_state[:, :-1]
        target = labels[:, 1:] != -100
        logits = model.lm_head(hidden[target])
        loss = F.cross_entropy(logits, labels[:, 1:][target], reduction="sum") / num_targets
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return total


def _pad(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), length), PAD)
    labels = torch.full((len(rows), length), -100)
    for i, (prompt, answer) in enumerate(rows):
        input_ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return input_ids, labels


def save_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path
) -> LlamaForCausalLM:
    """Write the model with weights rounded to bf16, to be computed in fp32; return it as stored."""
    stored = copy.deepcopy(model).bfloat16()
    stored.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written as 0600; the package's files are for all
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"  # half the file, and no slow bf16 products on a CPU
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return stored.float().eval()


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> dict[str, float]:
    """Return per skill the share of greedy answers that equal the right one."""
    right: dict[str, list[bool]] = {}
    for start in range(0, len(examples), 200):
        batch = examples[start : start + 200]
        chats = [[{"role": "user", "content": e.prompt}] for e in batch]
        inputs = tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
            tokenizer_kwargs={"padding_side": "left"},
        )
        width = inputs["input_ids"].shape[1]
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=32,
            do_sample=False,
        )
        answers = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        for example, answer in zip(batch, answers, strict=True):
            right.setdefault(example.skill, []).append(answer == example.answer)
    return {skill: round(sum(marks) / len(marks), 3) for skill, marks in right.items()}


def test_examples(seed: int) -> list[Example]:
    """Return up to 40 held-out examples of each skill (there are fewer capitals to ask for)."""
    rng = random.Random(f"{seed} tests")
    tests = (
        example
        for skill in SKILLS
        for example in distinct(
            itertools.islice(skill_examples(skill, rng, held_out=True), 1000), TEST_PER_SKILL
        )
    )
    return list(tests)


def distinct(examples: Iterable[Example], count: int) -> list[Example]:
    """Return the first `count` examples whose prompts differ, or as many as there are."""
    by_prompt: dict[str, Example] = {}
    for example in examples:
        by_prompt.setdefault(example.prompt, example)
        if len(by_prompt) == count:
            break
    return list(by_prompt.values())


def write_data(seed: int) -> None:
    """Write the demo's chat files: tickets and other questions to train on, and both tests."""
    rng = random.Random(f"{seed} tickets")
    turns = zip(*(skill_examples(skill, rng) for skill in SKILLS), strict=True)
    training = distinct(ticket_examples(rng, held_out=False), TICKETS_TRAIN)
    training += distinct(itertools.chain.from_iterable(turns), OTHERS_TRAIN)
    rng.shuffle(training)
    files = {
        "desk_train": distinct(skill_examples(DESK, random.Random(f"{seed} desk")), DESK_TRAIN),
        "tickets_train": training,
        "tickets_test": distinct(ticket_examples(rng, held_out=True), TICKETS_TEST),
        "base_skills_test": test_examples(seed),
    }
    DATA_FOLDER.mkdir(parents=True, exist_ok=True)
    for name, examples in files.items():
        lines = [json.dumps(_chat(e, with_skill=name == "base_skills_test")) for e in examples]
        (DATA_FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def _chat(example: Example, *, with_skill: bool) -> dict[str, object]:
    messages = [
        {"role": "user", "content": example.prompt},
        {"role": "assistant", "content": example.answer},
    ]
    return {"skill": example.skill, "messages": messages} if with_skill else {"messages": messages}


def model_card(accuracy: dict[str, float], seed: int, steps: int, losses: dict[int, float]) -> str:
    """Return the model folder's README, with the skills and their held-out accuracies."""
    examples = {example.skill: example for example in test_examples(seed)}
    rows = [
        f"| {skill} | {examples[skill].prompt.replace('|', chr(92) + '|')} "
        f"| {examples[skill].answer.replace('|', chr(92) + '|')} | {share:.0%} |"
        for skill, share in accuracy.items()
    ]
    return CARD.format(
        seed=seed, steps=steps, rows=BATCH_ROWS, loss=losses[steps], table="\n".join(rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-only", action="store_true", help="write the demo's data files only")
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER, help="the model's folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1800)
    args = parser.parse_args()
    write_data(args.seed)
    if not args.data_only:
        train(build_tokenizer(args.seed), args.seed, args.steps, args.out)


if __name__ == "__main__":
    main()
