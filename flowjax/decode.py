"""Text from a language model (flowjax.models.language): one token after the other."""

import jax
import jax.numpy as jnp

END = 0


def decode(net, tokens, given, keys, temperature: float = 1.0):
    """Rows (B, L) that begin as `tokens` (B, L) do, up to given (B,), and go on as the model writes until it ends the text.

    net: tokens -> logits (B, L, vocab); keys: (B,), so that a row does not depend on its neighbours; temperature: that logits are
    divided by, 0 for the likeliest token. After its end a row is padded with END. Every token asks the network about the whole row.
    """
    given = jnp.asarray(given)

    def step(i, state):
        tokens, ended = state
        logits = net(tokens)[:, i - 1]
        if temperature == 0:
            drawn = jnp.argmax(logits, axis=-1)
        else:
            drawn = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in, (0, None))(keys, i), logits / temperature)
        own = i >= given
        token = jnp.where(own, jnp.where(ended, END, drawn), tokens[:, i]).astype(tokens.dtype)
        return tokens.at[:, i].set(token), ended | (own & (token == END))

    ended = jnp.zeros(len(tokens), bool)
    return jax.lax.fori_loop(1, tokens.shape[1], step, (jnp.asarray(tokens), ended))[0]
