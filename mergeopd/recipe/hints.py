"""Remedies for the keys and choices of other trainers, which a recipe spells otherwise or does not have."""

_UPDATES = "give the number of optimizer `updates` of each phase"
_LEARNING_RATE = "the learning rate is `optimizer.lr`; `lr_scale` multiplies it in one phase"
_BATCH = (
    "`prompts_per_round` of a phase is the number of prompts in a round, and "
    "`student.micro_batch_tokens` the number of tokens in one forward pass"
)
_DEVICE = "remove it: a GPU is used if torch finds one; CUDA_VISIBLE_DEVICES selects it"
_ADAPTER = "remove it: LoRA is not implemented, all weights of the student are trained"
_TRACKERS = "trackers are listed under `report`: `report: {trackers: [wandb, mlflow, trackio, tensorboard]}`"
_ENGINE = "servers are `rollout: {engine: vllm, url: http://HOST:PORT}` (or `sglang`)"
_SERVED = "it needs an engine that generates outside the training process: `engine: vllm` or `engine: sglang`"

_INTERIM = "accuracy during training is `evaluation.interim: {every: N}`, with N in updates"
_BEST = "the best student is exported with `checkpoint.best: accuracy`, or a suite's name"

_SUBSET = "the subset of a dataset is `subset`"
_SOURCES = "`prompts` lists the sources: `- {source: ID_OR_FILE, subset: NAME, split: train, domain: NAME}`"

# By word, or by section and word: see `problems_of`.
HINTS = {
    "epochs": _UPDATES,
    "num_train_epochs": _UPDATES,
    "steps": _UPDATES,
    "max_steps": _UPDATES,
    "lr": _LEARNING_RATE,
    "learning_rate": _LEARNING_RATE,
    "batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": (
        "remove it: gradients are accumulated over forward passes of `student.micro_batch_tokens` tokens"
    ),
    "evaluation.every": _INTERIM,
    "eval_steps": _INTERIM,
    "eval_every": _INTERIM,
    "test_freq": _INTERIM,
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "prompts.name": _SUBSET,
    "config_name": _SUBSET,
    "dataset_config": _SUBSET,
    "dataset": _SOURCES,
    "dataset_name": _SOURCES,
    "datasets": _SOURCES,
    "device": _DEVICE,
    "lora": _ADAPTER,
    "peft": _ADAPTER,
    "vllm": _ENGINE,
    "sglang": _ENGINE,
    "use_vllm": _ENGINE,
    "vllm_mode": _ENGINE,
    "vllm_server_base_url": _ENGINE,
    "rollout.ahead": _SERVED,
    "rollout.max_staleness": _SERVED,
    "rollout.url": _SERVED,
    "rollout.launch": _SERVED,
    "report.tensorboard": "write `report: {trackers: [tensorboard]}`",  # its form in earlier versions
    "report_to": _TRACKERS,
    "logger": _TRACKERS,
    "trackers": _TRACKERS,
    "wandb": _TRACKERS,
    "phases.teach": "did you mean `distill_on`?",  # its name in earlier versions
    "model": "the model to train is `student.model`",
    "teachers.model": (
        "write a card with `mergeopd new teacher NAME --model DIR`, then name it: `card: teachers/NAME.yaml`"
    ),
}
