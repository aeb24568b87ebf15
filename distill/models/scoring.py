"""Label scoring: the probability of each label as the answer to a closed *classify* or *review* prompt."""

import inspect
from collections.abc import Sequence

import torch
from peft import PeftModel

from distill.models.backbone import Backbone
from distill.models.encoding import Features


def score_labels(backbone: Backbone, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [B, K] and label mass [B] of right-padded prompts closed with the forced prefix (DESIGN section 6).

    Labels that differ in their first token are told apart by it; others are scored whole, with their end tokens.
    """
    if backbone.labels_share_tokens:
        log_probabilities = label_log_probabilities(backbone, features)
        mass = log_probabilities.exp().sum(-1)
        # too small for a float, perhaps, but 0 would say that there is no answer
        return log_probabilities.softmax(-1), mass.clamp(min=torch.finfo(mass.dtype).tiny)
    last = features["attention_mask"].sum(1) - 1
    kept = int(features["input_ids"].shape[1] - last.min())
    logits = backbone.model(**features, logits_to_keep=kept).logits
    offset = features["input_ids"].shape[1] - logits.shape[1]
    return normalise_labels(logits[torch.arange(len(last)), last - offset], backbone.label_ids.to(logits.device))


def normalise_labels(logits: torch.Tensor, label_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the K labels alone and the mass they held, from next-token logits [B, V] and token ids [K]."""
    log_probabilities = torch.log_softmax(logits.float(), -1)[:, label_ids]
    return log_probabilities.softmax(-1), log_probabilities.exp().sum(-1)


def label_log_probabilities(backbone: Backbone, features: Features) -> torch.Tensor:
    """Log-probabilities [B, K] of the whole labels with their end tokens; differentiable.

    All labels are scored in one forward pass behind one prompt, as branches that cannot see each other. A row is laid
    out as `prompt, padding, root, branch 1, ..., branch K`: the root is the prompt's last token, moved behind the
    padding so that it stands in one column for all rows, and a branch is a label without its end token. Positions run
    on from the prompt in every branch. Logits are computed from the root on only.

    Args:
        features: right-padded prompts closed with the forced prefix, as `Backbone.encode` makes them.
    """
    tree = _Tree(backbone.label_tokens, backbone.device)
    ids, mask = features["input_ids"], features["attention_mask"].bool()
    last = mask.sum(1, keepdim=True) - 1
    inputs = {
        name: torch.nn.functional.pad(value, (0, tree.size)) if value.shape == ids.shape else value
        for name, value in features.items()
    }
    inputs["input_ids"] = torch.cat([ids, ids.gather(1, last), tree.written.expand(len(ids), -1)], 1)
    positions = _positions(backbone.model, features)
    root = positions.gather(-1, last.expand(*positions.shape[:-1], 1))
    inputs["position_ids"] = torch.cat([positions, root + tree.depth], -1)
    seen = tree.attention(mask.scatter(1, last, False))
    if backbone.settings.attention == "eager":  # which adds its mask
        seen = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float32).min)
    inputs["attention_mask"] = seen
    return tree.sums(backbone.model(**inputs, logits_to_keep=tree.size, use_cache=False).logits)


class _Tree:
    """A root and K branches of N tokens together, in `size` = 1 + N columns: what each column sees and predicts.

    Attributes:
        written: [N], the branches' tokens.
        depth: [size], each column's distance from the root.
    """

    def __init__(self, labels: Sequence[Sequence[int]], device: torch.device) -> None:
        branch, depth, columns = [-1], [0], []
        for label, tokens in enumerate(labels):
            columns += [0, *range(len(branch), len(branch) + len(tokens) - 1)]  # the end token has none of its own
            branch += [label] * (len(tokens) - 1)
            depth += range(1, len(tokens))
        self.size, self.depth = len(depth), torch.tensor(depth, device=device)
        self.written = torch.tensor([token for tokens in labels for token in tokens[:-1]], device=device)
        self._branch = torch.tensor(branch, device=device)
        self._columns = torch.tensor(columns, device=device)
        self._targets = torch.tensor([token for tokens in labels for token in tokens], device=device)
        self._lengths = [len(tokens) for tokens in labels]

    def attention(self, prompt: torch.Tensor) -> torch.Tensor:
        """Which columns each column sees, [B, 1, T + size, T + size], behind prompts whose keys are True in [B, T]."""
        rows, width = prompt.shape
        alike = self._branch[:, None] == self._branch
        before = self.depth[:, None] >= self.depth
        seen = torch.zeros(rows, 1, width + self.size, width + self.size, dtype=torch.bool, device=prompt.device)
        seen[..., :width] = prompt[:, None, None]
        seen[..., :width, :width] &= torch.ones(width, width, dtype=torch.bool, device=prompt.device).tril()
        seen[..., width:, width:] = alike & before
        seen[..., width:, width] = True
        return seen

    def sums(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [B, K] of the labels, from logits [B, size, V]."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        tokens = logits[:, self._columns, self._targets] - logits.logsumexp(-1)[:, self._columns]
        return torch.stack([part.sum(1) for part in tokens.split(self._lengths, 1)], 1)


def _positions(model: torch.nn.Module, features: Features) -> torch.Tensor:
    """Position ids [..., B, T] of right-padded prompts: multimodal ones where the model has them, plain otherwise."""
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    index = getattr(getattr(whole, "model", whole), "get_rope_index", None)
    if index is None:
        return (features["attention_mask"].cumsum(1) - 1).clamp(min=0)
    known = inspect.signature(index).parameters
    positions: torch.Tensor = index(**{name: value for name, value in features.items() if name in known})[0]
    return positions
