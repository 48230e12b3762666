"""An exact reverse KL to a teacher, in a trainer of your own: from the hidden states of two models.

No [tokens, vocabulary] matrix is kept. The models may differ in width; they share the vocabulary.
"""

import torch

from mergeopd.loss import Head, Hidden, ReverseKL, build_objective, fused_loss

torch.manual_seed(0)
num_tokens, vocabulary, width, teacher_width = 300, 1000, 64, 96
hidden = torch.randn(num_tokens, width, requires_grad=True)  # your student's last hidden states
weight = torch.randn(vocabulary, width, requires_grad=True)  # its lm_head.weight
teacher_hidden = torch.randn(num_tokens, teacher_width)
teacher_weight = torch.randn(vocabulary, teacher_width) / 4
labels = torch.randint(vocabulary, (num_tokens,))  # the next tokens
mask = torch.rand(num_tokens) < 0.8  # True for response tokens

objective = build_objective({"reverse_kl": (ReverseKL(), 1.0)})
target = Hidden(teacher_hidden, Head(teacher_weight))
loss, stats = fused_loss(
    hidden, Head(weight), [target], labels, objective.mean_over(mask), divergences=objective.divergences
)
loss.backward()
print(f"reverse KL {loss.item():.4f}, entropy of the student {stats.entropy_S.mean():.4f}")

# The same with full logits and autograd.
student = (hidden @ weight.T).log_softmax(-1)
teacher = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
expected = (student.exp() * (student - teacher)).sum(-1)[mask].mean()
for name, tensor, gradient in zip(
    ("hidden", "weight"), (hidden, weight), torch.autograd.grad(expected, (hidden, weight)), strict=True
):
    difference = ((tensor.grad - gradient).norm() / gradient.norm()).item()
    print(f"gradient of {name}: relative difference from autograd {difference:.0e}")
    assert difference < 1e-5
assert abs(loss.item() - expected.item()) < 1e-4
