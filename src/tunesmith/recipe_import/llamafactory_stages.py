"""LLaMA-Factory's stages: which objective each of them is, and what becomes of its settings."""

from __future__ import annotations

from tunesmith.recipe_import.job import LOUD, Entry, Job

STAGES = ("sft", "pt", "rm", "dpo", "kto", "ppo")
PAIRS = ("rm", "dpo")
"""Stages whose rows are pairs (`ranking`)."""
VARIANTS = ("sigmoid", "ipo", "hinge")
SETTINGS = {
    "dpo": ("pref_loss", "pref_beta", "pref_ftx", "dpo_label_smoothing", "simpo_gamma", "ref_model"),
    "kto": ("pref_beta", "pref_ftx", "kto_chosen_weight", "kto_rejected_weight", "ref_model"),
    "ppo": ("reward_model", "reward_model_type", "ppo_epochs", "ppo_buffer_size", "ppo_target", "ppo_whiten_rewards")
    + ("ppo_score_norm", "max_new_tokens", "temperature", "top_p", "top_k", "ref_model"),
}
KEYS = tuple(dict.fromkeys(key for keys in SETTINGS.values() for key in keys))


def stage(job: Job) -> None:
    name = job.text("stage")
    if name not in (None, *STAGES):
        job.refuse("stage", f"the stage {name!r} is not available; {', '.join(STAGES)} are", "import a file of one")
    if name == "pt" and job.flag("packing") is False and not job.flag("neat_packing"):
        job.say("stage", "translated", "data.format", "raw text, of which every token is trained on")
    elif name == "pt":
        job.put("objective.kind", "pretrain", "stage", "raw text, joined and cut into blocks")
    elif name == "rm":
        job.put("objective.kind", "reward", "stage")
    elif name == "dpo":
        _pairs(job)
    elif name == "kto":
        _single(job)
    elif name == "ppo":
        _rewarded(job)
    elif name is not None:
        job.say("stage", "taken", "objective.kind")
    for key in KEYS:
        if job.get(key) is not None and key not in job.said and key not in SETTINGS.get(name or "sft", ()):
            job.say(key, "ignored", note="other stages only")
    if job.flag("do_train") is False:
        job.lose("do_train", "a recipe trains")
    else:
        job.say("do_train", "ignored", note="a recipe trains")


def _pairs(job: Job) -> None:
    loss = job.text("pref_loss") or "sigmoid"
    kind = loss if loss in ("simpo", "orpo") else "dpo"
    job.put("objective.kind", kind, "stage", "" if kind == "dpo" else "by pref_loss")
    if loss in VARIANTS:
        job.recipe["objective.variant"] = loss
        job.say("pref_loss", "taken", "objective.variant")
    elif kind != "dpo":
        job.say("pref_loss", "translated", "objective.kind")
    elif loss == "kto_pair":
        note = "pairs are compared by DPO's own loss; KTO is for single answers (stage kto)"
        job.lose("pref_loss", note, to="objective.variant")
    else:
        job.unfit("pref_loss", "sigmoid, ipo, hinge, simpo, orpo or kto_pair")
    _beta(job)
    if kind == "simpo":
        if (gamma := job.number("simpo_gamma")) is not None:
            job.put("objective.gamma", gamma, "simpo_gamma")
        else:
            job.default("objective.gamma", 0.5, "simpo_gamma is absent")
    else:
        job.say("simpo_gamma", "ignored", note="of SimPO only")
    weight = job.number("pref_ftx")
    if weight and kind == "dpo":
        note = f"{LOUD}the better answers' likelihood is the mean over tokens here, and over answers there"
        job.put("objective.nll_weight", weight, "pref_ftx", note)
    elif weight:
        job.lose("pref_ftx", f"{kind} has no further likelihood of the better answers")
    else:
        job.say("pref_ftx", "ignored", note="off, as here")
    smoothing = job.number("dpo_label_smoothing")
    if smoothing and loss == "sigmoid":
        job.put("objective.label_smoothing", smoothing, "dpo_label_smoothing")
    else:
        job.say("dpo_label_smoothing", "ignored", note="it is of the loss sigmoid, or off")
    _reference(job, needed=kind == "dpo")


def _single(job: Job) -> None:
    job.put("objective.kind", "kto", "stage")
    _beta(job)
    for key, to in (("kto_chosen_weight", "desirable_weight"), ("kto_rejected_weight", "undesirable_weight")):
        if (weight := job.number(key)) is not None:
            job.put(f"objective.{to}", weight, key)
    if job.number("pref_ftx"):
        job.lose("pref_ftx", "kto has no further likelihood of the good answers")
    else:
        job.say("pref_ftx", "ignored", note="off, as here")
    _reference(job, needed=True)


def _rewarded(job: Job) -> None:
    job.put("objective.kind", "ppo", "stage")
    model = job.text("reward_model")
    if model is None:
        job.refuse("stage", "ppo needs a reward model, and the file names none", "name it under `reward_model:`")
    if job.text("reward_model_type") == "api":
        job.refuse(
            "reward_model_type",
            "a reward model behind an address is not available",
            "name a directory, or write a function and set objective.reward to it",
        )
    job.recipe["objective.reward"] = [{"kind": "model", "path": model}]
    note = (
        f"{LOUD}it must be a model with a head for one number: value heads of LLaMA-Factory are not read, train it here"
    )
    job.say("reward_model", "translated", "objective.reward", note)
    job.say("reward_model_type", "ignored", "objective.reward", "seen from the directory")
    for key, to in (("ppo_epochs", "passes"), ("max_new_tokens", "max_new_tokens")):
        if (value := job.whole(key, least=1)) is not None:
            job.put(f"objective.{to}", value, key)
    if job.get("max_new_tokens") is None:
        job.default("objective.max_new_tokens", 1024, "max_new_tokens is absent")
    job.default("objective.kl", 0.2, "LLaMA-Factory starts its controller there")
    target = job.number("ppo_target")
    if target is None:
        job.default("objective.kl_target", 6.0, "ppo_target is absent")
    else:
        job.put("objective.kl_target", target, "ppo_target")
    if (flag := job.flag("ppo_whiten_rewards")) is not None:
        job.put("objective.whiten_rewards", flag, "ppo_whiten_rewards")
    if job.flag("ppo_score_norm"):
        job.lose("ppo_score_norm", "rewards are used as they are")
    else:
        job.say("ppo_score_norm", "ignored", note="off, as here")
    if (job.whole("ppo_buffer_size", least=1) or 1) > 1:
        job.lose("ppo_buffer_size", "answers are drawn for one step: multiply train.batch_size by it")
    else:
        job.say("ppo_buffer_size", "ignored", note="1, as here")
    how = "answers are drawn at temperature 1 from the whole vocabulary"
    for key in ("temperature", "top_p", "top_k"):
        if job.get(key) is not None:
            job.lose(key, how)
    if all(job.get(key) is None for key in ("temperature", "top_p", "top_k")):
        job.defaults.append(f"temperature: 1 ({LOUD}{how}; there at 0.95, top_p 0.7 and top_k 50)")
    _reference(job, needed=True)


def _beta(job: Job) -> None:
    if (beta := job.number("pref_beta")) is not None:
        job.put("objective.beta", beta, "pref_beta")
    else:
        job.default("objective.beta", 0.1, "pref_beta is absent")


def _reference(job: Job, *, needed: bool) -> None:
    named = job.text("ref_model")
    if named is None:
        return
    if needed and named != job.text("model_name_or_path"):
        job.lose("ref_model", "the reference is the model as this job began")
    else:
        job.say(
            "ref_model", "ignored", note="the model as the job began, as here" if needed else "no reference is used"
        )


STAGE = Entry(
    ("stage", "do_train", *KEYS),
    "objective.*",
    "sft; pt is pretrain, or raw text row by row without packing; rm is reward; dpo is dpo, simpo or orpo by pref_loss "
    "(kto_pair is DPO's loss), with pref_beta as beta and pref_ftx as nll_weight; kto; ppo with its reward model; keys "
    "of other stages are ignored",
    stage,
)
