r"""The remedies: what to do where the statistics of one batch will not do. One file a remedy, on the same engine.

Some remedies are no function of their own, but a line or two with existing ones.

*Synchronization in groups* (Ying et al., "Image Classification at Supercomputer Scale", 2018): ``axis_name`` and
``axis_index_groups`` of `jaxnorm.batch_norm`; or `jaxnorm.ghost_batch_norm`, whose groups are sized by examples.

*The union of batches* that are given together (Bhatt et al., "CrossQ: Batch Normalization in Deep Reinforcement
Learning for Greater Sample Efficiency and Simplicity", ICLR 2024): the pairs of state and action that the critic is
trained on, and those that its target is computed from, pass through it as one batch, so that there is one distribution.

>>> import jax, jax.numpy as jnp, jaxnorm
>>> now, then = jnp.array([[0.0], [2.0]]), jnp.array([[4.0], [6.0]])
>>> y, batch = jaxnorm.batch_norm(jnp.concatenate([now, then]))
>>> y_now, y_then = jnp.split(y, 2)
>>> target = jax.lax.stop_gradient(y_then)
>>> batch.mean.tolist()
[3.0]

*Test-time adaptation* (Schneider et al., "Improving Robustness against Common Corruptions by Covariate Shift
Adaptation", NeurIPS 2020, equation 2): what was learned counts as ``prior`` values, and the n of a test batch are
averaged with it.

>>> running = jaxnorm.init_running(1)
>>> x, n, prior = 10 + jnp.array([[-1.0], [1.0]]), 2, 6
>>> adapted = jaxnorm.update_running(running, jaxnorm.moments(x, 0), alpha=n / (n + prior))
>>> adapted.mean.tolist()
[2.5]
>>> y = jaxnorm.normalize(x, adapted)

*Conditional normalization* (de Vries et al., "Modulating Early Visual Processing by Language", NeurIPS 2017; Huang and
Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization", ICCV 2017; Perez et al., "FiLM",
AAAI 2018; Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023): scale and bias of every function
may have the shape ``(batch, *features)``, one for each example, computed from what it is conditioned on. AdaIN takes
those of a style:

>>> content, style = jnp.array([[[1.0], [3.0]]]), jnp.array([[[10.0], [30.0]]])
>>> of_style = jaxnorm.moments(style, 1)
>>> jaxnorm.instance_norm(content, jnp.sqrt(of_style.var), of_style.mean, epsilon=0.0).ravel().tolist()
[10.0, 30.0]
"""
