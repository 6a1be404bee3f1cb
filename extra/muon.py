"""Muon with the matrices of one shape in one batch.

Muon (Jordan et al. 2024) makes the update of a matrix nearly orthogonal, by five steps of a
polynomial, which are fifteen matrix products. torch.optim.Muon runs through the matrices one by one;
for a small model these products are two thirds of all products of a step, and most of their time is
starting them. Here matrices of one shape, and those of the transposed shape, are stacked first.
"""
import torch


def orthogonalise(update, coefficients, steps, eps):
    """Newton-Schulz iteration: update [N, rows, columns], rows <= columns -> bfloat16, the singular
    values of each matrix near 1. As `_zeropower_via_newtonschulz` in torch.optim."""
    a, b, c = coefficients
    x = update.bfloat16()
    norm = x.flatten(1).norm(dim=1).clamp(min=eps)       # [N]; it bounds the largest singular value
    x = x / norm[:, None, None]
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)                        # [N, rows, rows]
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


class Muon(torch.optim.Muon):
    """torch.optim.Muon with adjust_lr_fn='match_rms_adamw', the same up to rounding. Sharded matrices
    (FSDP) go to torch's own step, because stacking them would gather them all at once."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            with_grad = [p for p in group['params'] if p.grad is not None]
            if any(hasattr(p, 'full_tensor') for p in with_grad):
                super().step()
                return
            batches = {}                     # (shorter side, longer side) -> matrices
            for p in with_grad:
                batches.setdefault((min(p.shape), max(p.shape)), []).append(p)
            for matrices in batches.values():
                self.step_batch(matrices, group)

    def step_batch(self, matrices, group):
        """One step for matrices of one shape or its transpose."""
        momentum = group['momentum']
        gradients = [p.grad for p in matrices]
        averages = []
        for p in matrices:
            if 'momentum_buffer' not in self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p.grad)
            averages.append(self.state[p]['momentum_buffer'])
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        updates = averages
        if group['nesterov']:
            updates = torch._foreach_lerp(gradients, averages, momentum)
        is_tall = [p.shape[0] > p.shape[1] for p in matrices]
        wide = [u.mT if tall else u for u, tall in zip(updates, is_tall)]
        orthogonal = orthogonalise(torch.stack(wide), group['ns_coefficients'], group['ns_steps'], group['eps'])
        lr = group['lr']
        # So that an entry changes by about 0.2 lr, as by AdamW (adjust_lr_fn='match_rms_adamw')
        scaled_lr = .2 * lr * max(matrices[0].shape) ** .5
        if group['weight_decay']:
            torch._foreach_mul_(matrices, 1 - lr * group['weight_decay'])
        for p, update, tall in zip(matrices, orthogonal, is_tall):
            p.add_(update.mT if tall else update, alpha=-scaled_lr)
