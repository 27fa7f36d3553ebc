"""axolotl's `rl` and `reward_model`: which objective each of them is, its settings, and how its rows are written."""

from __future__ import annotations

from tunesmith.recipe_import.job import LOUD, Entry, Job

KINDS = {"dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "simpo": "simpo", "grpo": "grpo"}
SETTINGS = {
    "dpo": ("dpo_beta", "dpo_label_smoothing", "rpo_alpha", "dpo_norm_loss", "dpo_use_weighting"),
    "kto": ("kto_desirable_weight", "kto_undesirable_weight"),
    "orpo": ("orpo_alpha",),
    "simpo": ("simpo_gamma", "cpo_alpha"),
    "grpo": ("trl",),
}
KEYS = ("rl_beta", *(key for keys in SETTINGS.values() for key in keys))
TRL = {
    "num_generations": "group_size",
    "max_completion_length": "max_new_tokens",
    "num_iterations": "passes",
    "epsilon": "clip",
    "epsilon_high": "clip_high",
    "beta": "kl",
}
"""Settings of axolotl's section `trl` that are numbers here too."""
COUNTS = ("num_generations", "max_completion_length", "num_iterations")
AVERAGES = {"grpo": "answer", "bnpo": "token", "dapo": "token", "dr_grpo": "budget"}
TRL_KEYS = (*TRL, "reward_funcs", "reward_weights", "loss_type", "scale_rewards", "use_vllm", "temperature", "top_p")

PAIR_COLUMNS = {
    "intel": {"prompt": "question"},
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "argilla_chat": {},
    "icr": {"prompt": "input"},
    "prompt_pairs": {},
    "ultra": {},
}
"""By the last part of a type's name; parts that are not named bear their own names."""
LABEL_COLUMNS = {
    "argilla": {"prompt": "instruction"},
    "intel": {"prompt": "question"},
    "prompt_pairs": {},
    "ultra": {},
}
"""The same for single answers with a label."""


def stage(job: Job) -> None:
    given = job.get("rl")
    name = None if given in (None, False) else str(given)
    if job.flag("process_reward_model"):
        job.refuse(
            "process_reward_model", "rewards of single steps are not available", "import a file of another stage"
        )
    if name is not None and name not in KINDS:
        job.refuse("rl", f"the stage {name!r} is not available; {', '.join(KINDS)} are", "import a file of one")
    if name is not None:
        job.put("objective.kind", KINDS[name], "rl", "the variant ipo" if name == "ipo" else "")
        {"dpo": _dpo, "kto": _kto, "orpo": _orpo, "simpo": _simpo, "grpo": _grpo}[KINDS[name]](job)
    elif job.flag("reward_model"):
        job.put("objective.kind", "reward", "reward_model")
    for key in ("rl", "reward_model", "process_reward_model"):
        if key not in job.said:
            job.say(key, "ignored", note="off")
    own = () if name is None else ("rl_beta", *SETTINGS[KINDS[name]])
    for key in KEYS:
        if job.get(key) is not None and key not in job.said and key not in own:
            job.say(key, "ignored", note="other stages only")


def _beta(job: Job, key: str, usual: float) -> None:
    """A stage's own key wins over `rl_beta`."""
    found = next((name for name in (key, "rl_beta") if job.get(name) is not None), None)
    if found is None:
        job.default("objective.beta", usual, f"{key} is absent")
    else:
        job.put("objective.beta", job.number(found), found)
    if found == key and key != "rl_beta":
        job.say("rl_beta", "ignored", note=f"{key} wins over it")


def _dpo(job: Job) -> None:
    ipo = str(job.get("rl")) == "ipo"
    job.recipe["objective.variant"] = "ipo" if ipo else "sigmoid"
    _beta(job, "dpo_beta", 0.1)
    smoothing, weight = job.number("dpo_label_smoothing"), job.number("rpo_alpha")
    if smoothing and not ipo:
        job.put("objective.label_smoothing", smoothing, "dpo_label_smoothing")
    else:
        job.say("dpo_label_smoothing", "ignored", note="off, or ipo, which knows none")
    if weight:
        job.put("objective.nll_weight", weight, "rpo_alpha")
    else:
        job.say("rpo_alpha", "ignored", note="off, as here")
    if job.flag("dpo_norm_loss") and not ipo:
        job.put("objective.length_normalized", True, "dpo_norm_loss")
    else:
        job.say("dpo_norm_loss", "ignored", note="off, or ipo, which divides by lengths already")
    if job.flag("dpo_use_weighting"):
        job.lose("dpo_use_weighting", "every pair weighs the same")
    else:
        job.say("dpo_use_weighting", "ignored", note="off, as here")


def _kto(job: Job) -> None:
    _beta(job, "rl_beta", 0.1)
    for key, to in (("kto_desirable_weight", "desirable_weight"), ("kto_undesirable_weight", "undesirable_weight")):
        if (weight := job.number(key)) is not None:
            job.put(f"objective.{to}", weight, key)


def _orpo(job: Job) -> None:
    _beta(job, "orpo_alpha", 0.1)
    job.default("objective.likelihood", "conversation", "TRL learns the prompt of the better side too")


def _simpo(job: Job) -> None:
    _beta(job, "rl_beta", 0.1)
    if (gamma := job.number("simpo_gamma")) is not None:
        job.put("objective.gamma", gamma, "simpo_gamma")
    else:
        job.default("objective.gamma", 0.5, "simpo_gamma is absent")
    if job.number("cpo_alpha"):
        job.lose("cpo_alpha", "simpo has no further likelihood of the better answers")
    else:
        job.say("cpo_alpha", "ignored", note="off, as here")
        if job.get("cpo_alpha") is None:
            job.defaults.append(
                f"cpo_alpha: 0 ({LOUD}TRL adds the likelihood of the better answers where cpo_alpha is absent)"
            )


def _grpo(job: Job) -> None:
    given = job.get("trl")
    if not isinstance(given, dict):
        job.refuse("rl", "grpo has its rewards in the section `trl`, and there is none", "name them: trl.reward_funcs")
    job.say("trl", "translated", "objective.*")
    job.opened["trl"] = TRL_KEYS
    _rewards(job)
    for name, to in TRL.items():
        key = f"trl.{name}"
        value = job.whole(key, least=1) if name in COUNTS else job.number(key)
        if value is not None:
            job.put(f"objective.{to}", value, key)
    for name, to, usual in (("max_completion_length", "max_new_tokens", 256), ("beta", "kl", 0.0)):
        if job.get(f"trl.{name}") is None and not (name == "beta" and job.get("rl_beta") is not None):
            job.default(f"objective.{to}", usual, f"trl.{name} is absent")
    if job.get("rl_beta") is not None:
        job.put("objective.kl", job.number("rl_beta"), "rl_beta")
    loss = job.text("trl.loss_type")
    if loss in AVERAGES:
        job.put("objective.average", AVERAGES[loss], "trl.loss_type")
    elif loss is not None:
        job.lose("trl.loss_type", f"there is no loss {loss!r}: it is that of {', '.join(AVERAGES)}")
    scales = job.get("trl.scale_rewards")
    if scales in (False, "none"):
        job.put("objective.scale", "none", "trl.scale_rewards")
    elif scales in (True, "group"):
        job.put("objective.scale", "group", "trl.scale_rewards")
    elif scales is not None:
        job.lose("trl.scale_rewards", "advantages are divided by the deviation of their group, or not at all")
    if job.get("trl.use_vllm"):
        job.lose("trl.use_vllm", "answers are drawn in this process unless objective.rollouts names a server")
    for name in ("temperature", "top_p"):
        if job.number(f"trl.{name}") not in (None, 1.0):
            job.lose(f"trl.{name}", "answers are drawn at temperature 1 from the whole vocabulary")
        else:
            job.say(f"trl.{name}", "ignored", note="1, as here")


def _rewards(job: Job) -> None:
    """Functions by `module.function`; those that axolotl calls with lists have to be written anew."""
    names, weights = job.texts("trl.reward_funcs"), job.get("trl.reward_weights")
    if not names:
        job.refuse(
            "trl.reward_funcs", "grpo needs rewards, and the file names none", "name functions: [module.function]"
        )
    shares = [1.0] * len(names)
    if weights is not None:
        if not isinstance(weights, list) or len(weights) != len(names):
            job.unfit("trl.reward_weights", "a number for every function")
        try:
            shares = [float(weight) for weight in weights]
        except (TypeError, ValueError):
            job.unfit("trl.reward_weights", "a number for every function")
    rewards = []
    for name, share in zip(names, shares, strict=True):
        module, _, function = name.rpartition(".")
        if not module or not function.isidentifier():
            job.unfit("trl.reward_funcs", "functions as module.function")
        path = f"{module.replace('.', '/')}.py:{function}"
        rewards.append({"kind": "function", "path": path, **({} if share == 1.0 else {"weight": share})})
    job.recipe["objective.reward"] = rewards
    note = f"{LOUD}a function is called here as function(prompt, answer, references) for one answer: write it so"
    job.say("trl.reward_funcs", "translated", "objective.reward", note)
    job.say("trl.reward_weights", "translated", "objective.reward", "the weight of each")


def row_layout(job: Job, type_name: str | None) -> tuple[str, dict[str, str], str] | None:
    """Format, columns and a note for the rows of a type such as `chatml.intel` in these stages.

    Returns:
        None in other stages, and for a type that is not known.
    """
    kind = job.recipe.get("objective.kind")
    if kind == "grpo":
        return "prompts", {}, f"{LOUD}a transform of one's own is not run: rows need a column `prompt`"
    if kind not in ("dpo", "orpo", "simpo", "kto", "reward") or type_name is None:
        return None
    family, _, name = type_name.partition(".")
    if family not in ("chatml", "llama3", "gemma", "zephyr", "mistral", "phi3", "chat_template", "bradley_terry"):
        return None
    note = "" if family in ("chat_template", "bradley_terry") else "the template of the prompts is data.template"
    if kind == "kto":
        found = LABEL_COLUMNS.get(name)
        return None if found is None else ("unpaired", dict(found), note)
    if family == "bradley_terry":
        return "preference", {"prompt": "input"}, note
    if family == "chat_template" and name in ("", "default"):
        return "preference", {"prompt": "messages"}, note
    found = PAIR_COLUMNS.get(name)
    return None if found is None else ("preference", dict(found), note)


STAGE = Entry(
    ("rl", "reward_model", "process_reward_model", *KEYS),
    "objective.*",
    "dpo, ipo (dpo's variant), kto, orpo, simpo, grpo and reward_model, with beta, weights and margins; grpo's rewards "
    "are functions to be written for one answer at a time; keys of other stages are ignored",
    stage,
)
