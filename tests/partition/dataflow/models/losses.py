"""Losses: what outputs are compared with, derivatives in them, and terms of parameters alone."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from tests.partition.dataflow.models.parts import (
    IMAGE,
    INDEX,
    ROWS,
    TOKENS,
    B,
    D,
    F,
    T,
    V,
    X,
    conv,
    shape,
    shapes,
    stop,
    unit,
)

C = 5  # classes

# --- similarities ---------------------------------------------------------------------------------


def contrastive(p, x, y):
    a, b = x.mean(1) @ p["a"], y.mean(1) @ p["b"]
    a, b = a / jnp.linalg.norm(a, axis=-1, keepdims=True), b / jnp.sqrt((b * b).sum(-1)[:, None])
    return jax.nn.log_softmax(a @ b.T * jnp.exp(p["t"])).trace()


def contrastive_of_one(p, x, y):
    """Two views in one batch, each of which is the other's match."""
    z = unit(jax.nn.relu(jnp.concatenate([x, y]) @ p["u"]) @ p["w"])
    scores = z @ z.T / 0.1 - 1e9 * jnp.eye(2 * B)
    return jax.nn.log_softmax(scores)[jnp.arange(2 * B), (jnp.arange(2 * B) + B) % (2 * B)]


def unused_beside(p, x, y):
    """What a tower gives for each token is not used."""

    def tower(w, x):
        return x.mean(1) @ w, jnp.tanh(x) @ w

    (a, _), b = tower(p["a"], x), y.mean(1) @ p["b"]
    return jnp.diag(jax.nn.log_softmax(a @ b.T))


def redundancy(p, x, y):
    """Correlations of features, over the examples."""
    a, b = (jax.nn.relu(z @ p["u"]) @ p["w"] for z in (x, y))
    a, b = ((z - z.mean(0)) / z.std(0) for z in (a, b))
    return jnp.square(a.T @ b / B - jnp.eye(C)).sum()


def distances(p, x, y):
    a, b = (jax.nn.relu(z @ p["u"]) @ p["w"] for z in (x, y))
    d = jnp.sqrt(((a - b) ** 2).sum(-1) + 1e-6)
    return d**2 + jax.nn.relu(1 - d) ** 2


TOWER = shapes(u=(D, F), w=(F, C))
NEURONS = {"u": (1, F), "w": (1, C)}


def branch_and_trunk(derivative):
    def forward(p, x, y):
        branch = jnp.tanh(x @ p["a"]) @ p["b"]
        value = lambda y, branch: jnp.dot(branch, jnp.tanh(y @ p["u"]) @ p["w"])
        return jax.vmap(jax.grad(value) if derivative else value)(y, branch)

    return forward


# --- rows -----------------------------------------------------------------------------------------


def product_of_rows(p, i, x):
    return (p["u"][i] * p["v"][i]).sum(-1), x @ p["w"]


def product_of_rows_by_einsum(p, i, x):
    return jnp.einsum("bd,bd->b", p["u"][i], p["v"][i]), x @ p["w"]


def product_of_rows_kept(p, i, x):
    return (p["u"][i] * p["v"][i]).sum(-1, keepdims=True), x @ p["w"]


def product_of_rows_by_dot(p, i, x):
    return jax.vmap(lambda i: jnp.dot(p["u"][i], p["v"][i]))(i), x @ p["w"]


def product_of_rows_and_data(p, i, x):
    return (p["u"][i] * (x @ p["w"])).sum(-1), jnp.einsum("bd,bd->b", p["v"][i], x[:, :8])


RELATIONS = shapes(u=(V, 8), v=(7, 8), w=(D, 4))
RELATIONS_GRIDS = {"u": (V, 1), "v": (7, 1), "w": (1, 4)}

GRAPHS = {
    "products of three": lambda a, r, b: (a * r * b).sum(-1),
    "products of all": lambda a, r, b: jax.nn.log_softmax((a * r) @ b.T),
    "translations": lambda a, r, b: jnp.abs(a + r - b).sum(-1),
    "complex": lambda a, r, b: jnp.real(
        (lax.complex(a[:, :4], a[:, 4:]) * lax.complex(r[:, :4], r[:, 4:])
         * lax.complex(b[:, :4], -b[:, 4:])).sum(-1)
    ),
}  # fmt: skip


def of_a_graph(score):
    def forward(p, i, j, k):
        return score(p["e"][i], p["r"][j], p["e"][k])

    return forward


# --- classes --------------------------------------------------------------------------------------


def head(loss, tied=False):
    """A loss of hidden states, a head and labels."""

    def forward(p, tokens):
        h = p["e"][tokens]
        h = h + jnp.tanh(h @ p["w"])
        return loss(h, p["e"].T if tied else p["o"], tokens)

    return forward


def smoothed(h, w, y):
    log = jax.nn.log_softmax(30 * jnp.tanh(h @ w / 30))
    return -(optax.smooth_labels(jax.nn.one_hot(y, V), 0.1) * log).sum(-1).mean()


def of_largest(h, w, y):
    logits = (h @ w).astype("float32")
    total = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, y[..., None], -1)[..., 0]
    return (total - own + 1e-4 * total**2).mean()


def few_tokens(h, w, y):
    step = jax.checkpoint(lambda total, now: (total + of_largest(now[0], w, now[1]), None))
    return lax.scan(step, 0.0, (h.reshape(3, -1, D), y.reshape(3, -1)))[0]


def few_classes(h, w, y):
    """A part of the classes at a time, with the largest so far."""
    h, y = h.reshape(-1, D), y.reshape(-1)
    w = jnp.pad(w, ((0, 0), (0, 1)), constant_values=-1.0)
    w = jnp.moveaxis(w.reshape(D, 3, 4), 1, 0)

    def step(carry, now):
        top, total, own = carry
        i, w = now
        logits = h @ w
        largest = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - largest) + jnp.exp(logits - largest[:, None]).sum(-1)
        place = y - i * 4
        found = jnp.take_along_axis(logits, jnp.clip(place, 0, 3)[:, None], -1)[:, 0]
        return (largest, total, jnp.where((place >= 0) & (place < 4), found, own)), None

    first = jnp.full(y.shape, -jnp.inf), jnp.zeros(y.shape), jnp.zeros(y.shape)
    top, total, own = lax.scan(step, first, (jnp.arange(3), w))[0]
    return jnp.log(total) + top - own


def few_of_all(h, w, y):
    own = jnp.einsum("btd,dbt->bt", h, w[:, y])[..., None]
    return jax.nn.log_softmax(jnp.concatenate([own, h @ w[:, jnp.array([0, 3])]], -1))[..., 0]


def alignments(h, w, y):
    return optax.ctc_loss(h @ w, jnp.zeros((B, T)), y[:, :3], jnp.zeros((B, 3)))


def only_some(h, w, y):
    return jax.nn.log_softmax(jnp.where(jnp.arange(V) < V - 2, h @ w, -1e9))[..., 0]


CLASSES = {
    "smoothed": smoothed,
    "of the largest": of_largest,
    "few tokens at a time": few_tokens,
    "few classes at a time": few_classes,
    "few of all classes": few_of_all,
    "alignments": alignments,
    "only some classes": only_some,
}

# --- targets that the model makes -----------------------------------------------------------------


def trunk(p, x):
    return jax.nn.relu(x @ p["u"])


def taught_by_each_other(p, x):
    a, b = (jax.nn.log_softmax(trunk(p, x) @ p[name]) for name in "ab")
    return -(stop(jnp.exp(a)) * b).sum(-1) - (stop(jnp.exp(b)) * a).sum(-1)


def taught_by_einsum(p, x):
    a, b = (trunk(p, x) @ p[name] for name in "ab")
    target = stop(jax.nn.softmax(a))
    return jnp.einsum("bv,bv->b", target, jax.nn.log_softmax(b)), jax.nn.log_softmax(a)[:, 0]


def two_noises(p, x):
    """The divergence of two passes, each the other's target."""

    def one(seed):
        kept = jax.random.bernoulli(jax.random.key(seed), 0.9, (B, F))
        return jax.nn.log_softmax(jnp.where(kept, trunk(p, x), 0) @ p["a"])

    a, b = one(0), one(1)
    return (jnp.exp(a) * (a - b)).sum(-1) + (jnp.exp(b) * (b - a)).sum(-1) - a[:, 0]


def entropy(p, x):
    a = jax.nn.softmax(trunk(p, x) @ p["a"])
    mean = a.mean(0)
    return -(a * jnp.log(a + 1e-9)).sum(-1), (mean * jnp.log(mean + 1e-9)).sum()


def taught_by_an_average(p, x, u, a):
    target = stop(jax.nn.softmax(jax.nn.relu(x @ u) @ a))
    return -(target * jax.nn.log_softmax(trunk(p, x) @ p["a"])).sum(-1)


def next_value(p, x, y, reward):
    value = lambda x: trunk(p, x) @ p["a"]
    own = value(x) - value(x).mean(-1, keepdims=True) + trunk(p, x) @ p["b"]
    target = stop(reward + 0.99 * value(y).max(-1))
    return optax.huber_loss(own[:, 0] - target)


def quantised(rows, chosen):
    """Nearest codes, straight through."""

    def forward(p, image):
        z = conv(jax.nn.relu(conv(image, p["u"], 2)), p["v"])
        flat = z.reshape(-1, 8)
        distance = (flat**2).sum(1, keepdims=True) - 2 * flat @ p["e"].T + (p["e"] ** 2).sum(1)
        y = rows(p["e"], chosen(distance)).reshape(z.shape)
        commitment = ((z - stop(y)) ** 2).mean() + ((stop(z) - y) ** 2).mean()
        return conv(z + stop(y - z), p["w"]), commitment

    return forward


CODES = shapes(u=(4, 4, 3, 6), v=(3, 3, 6, 8), e=(V, 8), w=(3, 3, 8, 3))
CODES_GRIDS = {"u": (1, 1, 1, 6), "v": (1, 1, 1, 8), "e": (V, 1), "w": (1, 1, 1, 3)}

# --- of two nets ----------------------------------------------------------------------------------


def game(p, x, z):
    made = jnp.tanh(jax.nn.relu(z @ p["g"]) @ p["h"])
    critic = lambda x: (jax.nn.relu(x @ p["u"]) @ p["w"])[:, 0]
    real, unreal = critic(jnp.concatenate([x, stop(made)])), critic(made)
    return jax.nn.softplus(-real).mean() + jax.nn.softplus(-unreal).mean()


def sampled_between(p, x, noise):
    mean, log = jnp.split(jax.nn.relu(x @ p["u"]) @ p["w"], 2, -1)
    out = jax.nn.relu((mean + jnp.exp(log / 2) * noise) @ p["g"]) @ p["h"]
    return ((out - x) ** 2).sum(-1) - (1 + log - mean**2 - jnp.exp(log)).sum(-1) / 2


def own_guess(p, x, noise):
    """A first pass, whose result is an input."""
    net = lambda y: jax.nn.relu(jnp.concatenate([x + noise, y], -1) @ p["u"]) @ p["w"]
    return net(stop(net(jnp.zeros_like(x)))) - x


def twins(p, x, action):
    """Several critics, and a policy whose samples they judge."""
    mean, log = jnp.split(trunk(p, x) @ p["a"], 2, -1)
    act = jnp.tanh(mean + jnp.exp(jnp.clip(log, -5, 2)) * action)
    inside = lambda u, w: (jax.nn.relu(jnp.concatenate([x, act], -1) @ u) @ w)[:, 0]
    return jnp.exp(p["s"]) * (-log - jnp.log(1 - act**2 + 1e-6)).sum(-1) - jax.vmap(inside)(
        p["v"], p["w"]
    ).min(0)


# --- derivatives ----------------------------------------------------------------------------------


def net(p, x):
    h = jax.nn.softplus(x @ p["u"] + p["b"])
    return (jax.nn.softplus(h @ p["v"] + p["c"]) @ p["w"])[..., 0]


def error(p, x, y):
    return ((net(p, x) - y[..., 0]) ** 2).mean()


NET = shapes(u=(D, F), b=(F,), v=(F, F), c=(F,), w=(F, 1))
NET_GRIDS = {"u": (1, F), "b": (F,), "v": (1, F), "c": (F,), "w": (1, 1)}


def norm_of(tree):
    return jnp.sqrt(sum(jnp.sum(w**2) for w in jax.tree.leaves(tree)))


def penalty(p, x, y):
    """Of the slope between real and made examples."""
    between = x + jax.random.uniform(jax.random.key(0), (B, 1)) * (y - x)
    slope = jax.grad(lambda z: net(p, z).sum())(between)
    return net(p, y) - net(p, x) + (jnp.sqrt((slope**2).sum(-1) + 1e-12) - 1) ** 2


def forces(p, x, y):
    return ((-jax.vmap(jax.grad(lambda z: net(p, z)))(x) - y) ** 2).mean()


def energies_and_forces(p, x, y):
    energy, slope = jax.vmap(jax.value_and_grad(lambda z: net(p, z)))(x)
    return (energy - y[:, 0]) ** 2, ((-slope - y) ** 2).sum(-1)


def score(p, x, y):
    slope = jax.grad(lambda z: net(p, z))
    trace = lambda z: jnp.trace(jax.jacfwd(slope)(z)) + (slope(z) ** 2).sum() / 2
    return jax.vmap(trace)(x), net(p, x)


def sliced_score(p, x, y):
    slope = lambda z: jax.grad(lambda z: net(p, z).sum())(z)
    along = jax.random.rademacher(jax.random.key(0), x.shape, x.dtype)
    value, change = jax.jvp(slope, (x,), (along,))
    return (along * change).sum(-1) + (value * along).sum(-1) ** 2 / 2, net(p, x)


def curvature(p, x, y):
    along = jax.tree.map(jnp.ones_like, p)
    change = jax.jvp(jax.grad(lambda p: error(p, x, y)), (p,), (along,))[1]
    products = map(jnp.vdot, jax.tree.leaves(along), jax.tree.leaves(change))
    return error(p, x, y) + 1e-3 * sum(products)


def down(p, x, y):
    return jax.tree.map(lambda w, g: w - 0.1 * g, p, jax.grad(error)(p, x, y))


def learned_start(p, x, y):
    """Two steps for each of two tasks."""
    task = lambda x, y: error(down(down(p, x, y), x, y), x, y)
    return jax.vmap(task)(jnp.stack([x, y]), jnp.stack([y, x]))


def learned_start_scanned(p, x, y):
    return error(lax.scan(lambda p, _: (down(p, x, y), None), p, None, length=2)[0], y, x)


def learned_start_first_order(p, x, y):
    slope = stop(jax.grad(error)(p, x, y))
    return error(jax.tree.map(lambda w, g: w - 0.1 * g, p, slope), y, x)


def sharpness(p, x, y):
    slope = jax.grad(error)(p, x, y)
    norm = norm_of(slope) + 1e-12
    return error(jax.tree.map(lambda w, g: w + 0.05 * stop(g / norm), p, slope), x, y)


def slope_norm(p, x, y):
    return error(p, x, y) + 0.1 * norm_of(jax.grad(error)(p, x, y)) ** 2


def adversary(p, x, y):
    slope = lambda d: jax.grad(lambda d: error(p, x + d, y))(d)
    step = lambda i, d: jnp.clip(d + 0.01 * jnp.sign(slope(d)), -0.03, 0.03)
    return error(p, x + stop(lax.fori_loop(0, 3, step, jnp.zeros_like(x))), y)


def contraction(p, x, y):
    jacobian = jax.vmap(jax.jacrev(lambda z: jax.nn.sigmoid(z @ p["u"] + p["b"])))(x)
    return error(p, x, y) + 1e-2 * (jacobian**2).sum()


def by_second_gradient(p, x, y):
    u = lambda a, b: net(p, jnp.concatenate([a[None], b]))
    second = jax.vmap(jax.grad(jax.grad(u)))(x[:, 0], x[:, 1:])
    return second - 0.1 * jax.vmap(u)(x[:, 0], x[:, 1:])


def by_second_push(p, x, y):
    ones = jnp.ones_like(x)
    push = lambda x: jax.jvp(lambda x: net(p, x), (x,), (ones,))[1]
    return jax.jvp(push, (x,), (ones,))[1], net(p, x)


def by_hessian(p, x, y):
    return jax.vmap(lambda x: jnp.trace(jax.hessian(net, 1)(p, x)))(x), net(p, x)


def by_jacobian(p, x, y):
    jacobian = jax.jacfwd(jax.jacrev(net, 1), 1)
    return jax.vmap(lambda x: jnp.diag(jacobian(p, x)).sum())(x), net(p, x)


def by_directions(p, x, y):
    def laplacian(x):
        push = jax.linearize(lambda x: jax.grad(net, 1)(p, x), x)[1]
        step = lambda total, i: (total + push(jnp.eye(D)[i])[i], None)
        return lax.scan(step, 0.0, jnp.arange(D))[0]

    return jax.vmap(laplacian)(x), net(p, x)


def accelerations(p, x, y):
    """Of a mass that is made of second derivatives, and solved for."""

    def one(s):
        at, speed = s[: D // 2], s[D // 2 :]
        energy = lambda at, speed: net(p, jnp.concatenate([at, speed]))
        mass = jax.hessian(energy, 1)(at, speed) + jnp.eye(D // 2)
        mixed = jax.jacfwd(jax.grad(energy, 1), 0)(at, speed) @ speed
        return jnp.linalg.solve(mass, jax.grad(energy, 0)(at, speed) - mixed)

    return jax.vmap(one)(x) - y[:, : D // 2]


DERIVATIVES = {
    "penalty of slopes": penalty,
    "forces": forces,
    "energies and forces": energies_and_forces,
    "score": score,
    "score, sliced": sliced_score,
    "curvature": curvature,
    "learned start": learned_start,
    "learned start, scanned": learned_start_scanned,
    "learned start, first order": learned_start_first_order,
    "sharpness": sharpness,
    "norm of the slope": slope_norm,
    "adversary": adversary,
    "contraction": contraction,
    "second gradient": by_second_gradient,
    "second push": by_second_push,
    "hessian": by_hessian,
    "jacobian": by_jacobian,
    "directions one by one": by_directions,
    "accelerations": accelerations,
}

# --- terms of parameters --------------------------------------------------------------------------


def small(p, tokens):
    h = p["e"][tokens].mean(1)
    h = h * lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-6) * p["g"]
    return jax.nn.relu(h @ p["w"] + p["b"]) @ p["o"]


SMALL = shapes(e=(V, D), g=(D,), w=(D, F), b=(F,), o=(F, C))
SMALL_GRIDS = {"e": (V, 1), "g": (1,), "w": (1, F), "b": (F,), "o": (1, C)}


def leaves(p):
    return [p[name] for name in sorted(p)]


def beside(term):
    """A term of the parameters, and of as many numbers that are data."""

    def forward(p, tokens, *old):
        return small(p, tokens), term(p, dict(zip(sorted(p), old, strict=False)))

    return forward


def orthogonality(p, old):
    w, o = p["w"].T @ p["w"], p["o"] @ p["o"].T
    return jnp.square(w - jnp.eye(F)).sum() + jnp.square(o - jnp.eye(F)).sum()


def watched(p, old):
    norms = jax.tree.map(jnp.linalg.norm, p)
    return norms, jax.tree.map(lambda w: jnp.isfinite(w).all(), p)


TERMS = {
    "products with themselves": lambda p, old: sum(jnp.vdot(w, w) for w in leaves(p)),
    "squares": lambda p, old: sum(jnp.sum(w**2) for w in leaves(p)),
    "norm of all": lambda p, old: norm_of(p),
    "near the old": lambda p, old: sum(jnp.vdot(p[k] - old[k], p[k] - old[k]) for k in p),
    "along the old": lambda p, old: sum(jnp.vdot(p[k], old[k]) for k in p),
    "weighed": lambda p, old: sum((w**2 / old[k] ** 2).sum() for k, w in p.items()),
    "sizes": lambda p, old: sum(jnp.abs(w).sum() for w in leaves(p)),
    "orthogonality": orthogonality,
    "watched": watched,
}


def between(p, tokens, *old):
    """The model of parameters between two."""
    old = dict(zip(sorted(p), old, strict=True))
    return small({name: 0.3 * p[name] + 0.7 * old[name] for name in p}, tokens)


def average(p, tokens, *old):
    old = dict(zip(sorted(p), old, strict=True))
    return small(p, tokens), {name: 0.99 * old[name] + 0.01 * stop(p[name]) for name in p}


def scaled_by_loss(p, tokens):
    return small(p, tokens) * (1 + 1e-4 * (p["w"] ** 2).sum())


def printed(p, tokens):
    jax.debug.print("{}", jnp.linalg.norm(p["w"]))
    return small(p, tokens)


TWO = shapes(u=(D, F), a=(F, C), b=(F, C))
TWO_GRIDS = {"u": (1, F), "a": (1, C), "b": (1, C)}
HALVES = {name: TWO[name] for name in "ua"}
HALVES_GRIDS = {name: TWO_GRIDS[name] for name in "ua"}
OLD = leaves(SMALL)

MODELS = {
    "contrastive": (
        contrastive, shapes(a=(D, 7), b=(D, 7), t=()), [X, X], {"a": (1, 1), "b": (1, 1), "t": ()},
    ),
    "contrastive, of one": (contrastive_of_one, TOWER, [ROWS, ROWS], {"u": (1, F), "w": (1, 1)}),
    "unused beside": (
        unused_beside, shapes(a=(D, 7), b=(D, 7)), [X, X], {"a": (1, 1), "b": (1, 1)},
    ),
    "redundancy": (redundancy, TOWER, [ROWS, ROWS], NEURONS),
    "distances": (distances, TOWER, [ROWS, ROWS], NEURONS),
    **{
        f"branch and trunk{', its slope' * slope}": (
            branch_and_trunk(slope), shapes(a=(D, F), b=(F, 6), u=(2, F), w=(F, 6)),
            [ROWS, shape(B, 2)], {"a": (1, F), "b": (1, 1), "u": (1, F), "w": (1, 1)},
        )
        for slope in (False, True)
    },
    "tied autoencoder": (
        lambda p, x: jax.nn.relu(x @ p["w"]) @ p["w"].T, shapes(w=(D, 7)), [X], {"w": (D, 7)},
    ),
    "product of rows": (product_of_rows, RELATIONS, [INDEX, ROWS], RELATIONS_GRIDS),
    "product of rows, einsum": (
        product_of_rows_by_einsum, RELATIONS, [INDEX, ROWS], RELATIONS_GRIDS,
    ),
    "product of rows, kept": (product_of_rows_kept, RELATIONS, [INDEX, ROWS], RELATIONS_GRIDS),
    "product of rows, dot": (product_of_rows_by_dot, RELATIONS, [INDEX, ROWS], RELATIONS_GRIDS),
    "product of rows and data": (
        product_of_rows_and_data, {**RELATIONS, "w": shape(D, 8)}, [INDEX, ROWS],
        {"u": (V, 1), "v": (7, 1)},
    ),
    **{
        f"graph, {name}": (
            of_a_graph(fn), shapes(e=(V, 8), r=(4, 8)), [INDEX] * 3, {"e": (V, 1), "r": (4, 1)},
        )
        for name, fn in GRAPHS.items() if "of all" not in name
    },
    "graph, products of all": (
        lambda p, i, j: GRAPHS["products of all"](p["e"][i], p["r"][j], p["e"]),
        shapes(e=(V, 8), r=(4, 8)), [INDEX] * 2, {"e": (V, 1), "r": (4, 1)},
    ),
    **{
        f"classes, {name}": (
            head(loss), shapes(e=(V, D), w=(D, D), o=(D, V)), [TOKENS],
            {"e": (V, 1), "w": (1, D), "o": (1, V)},
        )
        for name, loss in CLASSES.items()
    },
    "classes, tied": (
        head(few_tokens, tied=True), shapes(e=(V, D), w=(D, D)), [TOKENS],
        {"e": (V, 1), "w": (1, D)},
    ),
    "taught by each other": (taught_by_each_other, TWO, [ROWS], TWO_GRIDS),
    "taught by einsum": (taught_by_einsum, TWO, [ROWS], TWO_GRIDS),
    "two noises": (two_noises, HALVES, [ROWS], HALVES_GRIDS),
    "entropy": (entropy, HALVES, [ROWS], HALVES_GRIDS),
    "taught by an average": (taught_by_an_average, HALVES, [ROWS, *HALVES.values()], HALVES_GRIDS),
    "next value": (
        next_value, {**TWO, "b": shape(F, 1)}, [ROWS, ROWS, shape(B)], {**TWO_GRIDS, "b": (1, 1)},
    ),
    "codes by index": (
        quantised(lambda e, i: e[i], lambda d: jnp.argmin(d, -1)), CODES, [IMAGE],
        CODES_GRIDS,
    ),
    "codes by one-hot": (
        quantised(lambda e, i: jax.nn.one_hot(i, V) @ e, lambda d: jnp.argmin(d, -1)), CODES,
        [IMAGE], CODES_GRIDS,
    ),
    "game": (
        game, shapes(g=(4, F), h=(F, D), u=(D, F), w=(F, 1)), [ROWS, shape(B, 4)],
        {"g": (1, F), "h": (1, D), "u": (1, F), "w": (1, 1)},
    ),
    "sampled between": (
        sampled_between, shapes(u=(D, F), w=(F, 8), g=(4, F), h=(F, D)), [ROWS, shape(B, 4)],
        {"u": (1, F), "w": (1, 8), "g": (1, F), "h": (1, D)},
    ),
    "own guess": (
        own_guess, shapes(u=(2 * D, F), w=(F, D)), [ROWS, ROWS], {"u": (1, F), "w": (1, D)},
    ),
    "twins": (
        twins, shapes(u=(D, F), a=(F, 6), s=(), v=(2, D + 3, 7), w=(2, 7, 1)), [ROWS, shape(B, 3)],
        {"u": (1, F), "a": (1, 6), "s": (), "v": (2, 1, 7), "w": (2, 1, 1)},
    ),
    **{name: (fn, NET, [ROWS, ROWS], NET_GRIDS) for name, fn in DERIVATIVES.items()},
    **{
        name: (beside(term), SMALL, [TOKENS, *OLD], SMALL_GRIDS) for name, term in TERMS.items()
    },
    "scaled by the loss": (scaled_by_loss, SMALL, [TOKENS], SMALL_GRIDS),
    "printed": (printed, SMALL, [TOKENS], SMALL_GRIDS),
    "between two": (between, SMALL, [TOKENS, *OLD], SMALL_GRIDS),
    "average": (average, SMALL, [TOKENS, *OLD], SMALL_GRIDS),
}  # fmt: skip
