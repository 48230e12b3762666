"""The likely cause of each alarm, and the setting to change."""

from __future__ import annotations

from collections.abc import Mapping

TEXTS: Mapping[str, tuple[str, str]] = {
    "zero_gradient": (
        "the student is saturated after too large updates, or all responses to a prompt have one reward",
        "lower `optimizer.lr` and start again; for rewards, raise `rollout.samples_per_prompt`",
    ),
    "gradient_spike": (
        "damaged prompts or responses, or a learning rate that is too high",
        "lower `optimizer.lr` or `optimizer.clip_grad`, and look at the responses of these updates",
    ),
    "divergence_rising": (
        "the learning rate is too high, or the teachers of two domains conflict",
        "lower `optimizer.lr`, lengthen `optimizer.warmup_updates`, or set `balance.tokens`",
    ),
    "entropy_collapse": (
        "the student collapsed to a few responses after too large updates",
        "lower `optimizer.lr` and start again",
    ),
    "length_collapse": (
        "a teacher or reward prefers to end at once: a wrong end token or template, a reward of short text",
        "compare `template` and end tokens of teacher and student, and check the `verifier`",
    ),
    "truncation": (
        "the limit is below the length of correct responses, or the student does not end its responses",
        "raise `rollout.max_new_tokens`, check the end tokens, or begin with a phase of `text: teacher`",
    ),
    "repetition": (
        "the student or its teacher loops",
        "look at the responses; lower `optimizer.lr`, or begin with a longer phase of `text: teacher`",
    ),
    "dead_domain": (
        "the student cannot solve these prompts yet, or the verifier does not match its responses",
        "check `verifier` and `reference_field`; lengthen the cold start (a phase of `text: teacher`), "
        "or mix text: `text: {on_policy_fraction: 0.5, otherwise: teacher}`",
    ),
    "starved_domain": (
        "few of its prompts are drawn, its responses are short, or its share of the balance is small",
        "raise `share` of its prompts, or set `balance.tokens: equal`",
    ),
    "rollout_gap": (
        "rollouts are sampled from another distribution than the one that is trained",
        "set `rollout.top_p` to 1, or correct for it with `correction: truncate`",
    ),
    "identical_teacher": (
        "the teacher's card names the base",
        "name the expert in `model` of the teacher's card",
    ),
    "mismatched_teacher": (
        "the teacher is not the expert of these prompts, its template or the sampling is wrong, "
        "or the base is untrained",
        "check `teachers` of the prompts, `template` of the card, `rollout.temperature` and `student.model`",
    ),
    "no_cold_start": (
        "the base cannot respond to these prompts yet, or the teacher is not their expert",
        "begin with a phase of `text: teacher`, or lengthen it, or mix text: "
        "`text: {on_policy_fraction: 0.5, otherwise: teacher}`; check `teachers` of the prompts",
    ),
    "low_shared_mass": (
        "the student is too far from this teacher to learn from its own responses, or the teacher reads "
        "another template",
        "begin with a phase of `text: teacher`, or lengthen it; check `template` of the card and `teachers` "
        "of the prompts",
    ),
    "shared_mass_falling": (
        "the student moves away from this teacher: the learning rate is too high, its text degenerates, or "
        "another teacher or reward pulls it elsewhere",
        "lower `optimizer.lr`, look at the responses, and balance the domains (`balance.tokens`)",
    ),
    "entropy_gap_rising": (
        "the student becomes certain where the teacher is not, or uncertain where it is certain",
        "lower `optimizer.lr`, or add `forward_kl` to a reverse KL, which keeps several modes",
    ),
    "weak_teacher": (
        "the teacher is not an expert of this domain, or its template or the verifier does not fit",
        "leave the teacher out, or check `template` of its card and `verifier`",
    ),
    "below_base": (
        "the student was damaged by a learning rate that is too high, a wrong teacher, or too many updates",
        "lower `optimizer.lr`, read the other alarms, and export an earlier checkpoint",
    ),
    "overlap": (
        "`allow_overlap` is set, and accuracy on these prompts does not measure unseen ones",
        "remove the prompts from one of the files",
    ),
}
"""Cause and remedy by the name of the alarm."""
