"""Credit of each token: the reward's slope at it, and what the policy expects of it."""

import torch

from speedrl.method.critic import expected_gain, reward_slopes
from speedrl.method.likelihoods import log_probs

CODES, WIDTH, LENGTH = 5, 3, 4


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_slopes_are_those_of_each_picture_alone_whatever_the_batch():
    codes, tokens = drawn(CODES, WIDTH), torch.randint(CODES, (6, LENGTH), generator=torch.Generator().manual_seed(1))
    weight = drawn(LENGTH, WIDTH, seed=2)

    def reward(embeddings, texts):
        return (embeddings * weight).sum((1, 2)).square() + torch.tensor([float(len(text)) for text in texts])

    texts = ["a" * i for i in range(6)]
    expected = 2 * (codes[tokens] * weight).sum((1, 2))[:, None, None] * weight
    for batch in (1, 4, 6):
        torch.testing.assert_close(reward_slopes(tokens, codes, reward, texts, batch=batch), expected)


def test_the_gradient_of_the_expected_gain_is_the_policy_gradient_over_all_codes_of_a_reward_that_is_linear():
    logits, codes, slopes = drawn(2, CODES), drawn(CODES, WIDTH, seed=1), drawn(2, WIDTH, seed=2)
    policy = logits.clone().requires_grad_()
    expected_gain(policy, slopes, codes).sum().backward()
    other = logits.clone().requires_grad_()
    probability = logits.softmax(-1)
    for code in range(CODES):  # E over the token drawn of reward times score
        reward = slopes @ codes[code]
        score = log_probs(other, torch.full((2,), code))
        (probability[:, code] * reward * score).sum().backward()
    torch.testing.assert_close(policy.grad, other.grad)


def test_a_baseline_in_the_slopes_changes_nothing():
    logits, codes, slopes = drawn(3, CODES), drawn(CODES, WIDTH), drawn(3, WIDTH, seed=2)
    grads = []
    for shift in (0.0, 7.0):  # the same vector added to every code adds the same reward to all
        policy = logits.clone().requires_grad_()
        expected_gain(policy, slopes, codes + shift).sum().backward()
        grads.append(policy.grad)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)
