"""What every layer of Keras has: a name, a dtype, variables made on the first call, penalties, constraints, weights as Keras lists them."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fused_attn.backends import require_name
from fused_attn.checks import described
from fused_attn.nn.keras import initializers, regularizers
from fused_attn.nn.keras.lookup import Config, serialized, snake_case
from fused_attn.nn.keras.policies import DTypePolicy
from fused_attn.nn.keras.weights import Weights

Shape = Sequence[int | None]
Rule = Callable[[Tensor], Tensor]
_counts: defaultdict[str, int] = defaultdict(int)


def _unique(prefix: str) -> str:
    _counts[prefix] += 1
    return prefix if _counts[prefix] == 1 else f"{prefix}_{_counts[prefix] - 1}"


class Layer(Weights):
    """Base of the layers: ``forward`` builds, casts and collects penalties around ``call``, which holds the layer's own computation.

    Parameters are made by ``build``, which the first call and ``load_state_dict`` run; call it yourself before you hand parameters to an
    optimizer or the layer to a compiler.

    Args:
        name: a str without "/"; made of the class' name by default.
        dtype: "float32" (also for None), "float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16", a torch dtype, or a config.
            ``Module.to`` changes it afterwards as it does for any module.
        trainable: whether the parameters require gradients.
        activity_regularizer: name, config or callable that makes a penalty of each output; it is divided by the batch.
        autocast: whether floating-point inputs are cast to the layer's dtype.
        backend: of ``fused_attn.attention``, for layers that attend.

    Raises:
        ValueError: the name, dtype or backend is none, or a keyword is unknown.
    """

    # Methods of Keras' layer that nothing here calls, so that an override would be silently without effect, unless it comes with one of the method named.
    _uncalled: ClassVar[tuple[str, ...]] = ()
    _instead: ClassVar[str] = "call"
    # Keras' own class has another name than the one it is found by.
    _prefixes: ClassVar[dict[str, str]] = {"GroupQueryAttention": "grouped_query_attention"}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        owner = next(c for c in cls.__mro__ if "_uncalled" in vars(c))
        overridden = [name for name in cls._uncalled if hasattr(cls, name)]
        if overridden and getattr(cls, cls._instead) is getattr(owner, cls._instead):
            raise TypeError(
                f"{cls.__name__} must override methods that are called; got {', '.join(overridden)}, which the fused path has no use for. "
                f"Override {cls._instead}."
            )

    def __init__(
        self,
        *,
        name: str | None = None,
        dtype: Any = None,
        trainable: bool = True,
        activity_regularizer: Any = None,
        autocast: bool = True,
        backend: str = "auto",
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"{type(self).__name__} must get arguments it knows; got {', '.join(unknown)}. Remove them.")
        self.name = _unique(self._prefixes.get(type(self).__name__) or snake_case(type(self).__name__)) if name is None else name
        if not isinstance(self.name, str) or "/" in self.name:
            raise ValueError(f"name must be a str without '/'; got {described(name)}. Leave it out for one made of the class' name.")
        self._policy = DTypePolicy.of(dtype)
        self._trainable, self.autocast, self.backend = trainable, autocast, require_name(backend)
        self.activity_regularizer = regularizers.get(activity_regularizer)
        self._losses: list[Tensor] = []
        self._regularizers: dict[str, Rule] = {}
        self._constraints: dict[str, Rule] = {}
        # Goes where the module is sent before it has parameters, so that they are made there.
        placement = torch.empty(0, dtype=self._policy.variables, device=torch.get_default_device())
        self.register_buffer("_placement", placement, persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        """Penalties belong to a graph, which neither deepcopy nor pickle can take along."""
        return {**self.__dict__, "_losses": []}

    @property
    def trainable(self) -> bool:
        """Whether the parameters require gradients; what is set holds for those that are made later, too."""
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As of every module, and holds for parameters that are made later; a module around this one knows only of those that exist."""
        for layer in self._layers():
            layer._trainable = requires_grad
        return super().requires_grad_(requires_grad)

    @property
    def variable_dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self._placement.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of inputs and results."""
        return self._policy.compute or self.variable_dtype

    def build(self, *shapes: Any) -> None:
        """Makes the parameters for inputs of these shapes."""
        self.built = True

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own computation, on inputs of its dtype; override this one."""
        raise NotImplementedError(f"{type(self).__name__} must define call(...).")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``call`` with the layer built, inputs in its dtype, and penalties of this call collected."""
        self._losses.clear()
        if not self.built:
            bound = inspect.signature(self.call).bind_partial(*args, **kwargs).arguments
            self._build_for(bound)
        if self.autocast:
            args = tuple([self._cast(value) for value in args])
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        outputs = self.call(*args, **kwargs)
        if self.activity_regularizer is not None:
            for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
                self.add_loss(self.activity_regularizer(output) / max(1, output.shape[0] if output.dim() else 1))
        return outputs

    def _build_for(self, inputs: dict[str, Any]) -> None:
        """Builds for the inputs of a call, by their names in ``call``, where these are enough."""

    def _build_on(self, tensor: Tensor, *shapes: Any) -> None:
        """Builds where a first input is."""
        if not self.built:
            self._placement = torch.empty(0, dtype=self._placement.dtype, device=tensor.device)
            self.build(*shapes)

    def _cast(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._cast(item) for item in value]
        return value.to(self.compute_dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def add_weight(
        self,
        name: str,
        shape: Sequence[int],
        initializer: Any,
        *,
        axes: tuple[Sequence[int] | None, Sequence[int] | None] = (None, None),
        regularizer: Rule | None = None,
        constraint: Rule | None = None,
    ) -> nn.Parameter:
        """Registers a new parameter; ``axes`` are the axes of its shape that count as inputs and as outputs."""
        found = initializers.get(initializer)
        assert found is not None
        values = initializers.made(found, shape, axes, self.variable_dtype, self._placement.device)
        parameter = nn.Parameter(values, requires_grad=self.trainable)
        self.register_parameter(name, parameter)
        if regularizer is not None:
            self._regularizers[name] = regularizer
        if constraint is not None:
            self._constraints[name] = constraint
        return parameter

    def add_loss(self, loss: Tensor) -> None:
        """Adds a penalty to those of this call."""
        self._losses.append(loss)

    def _layers(self) -> list[Layer]:
        return [module for module in self.modules() if isinstance(module, Layer)]

    def losses(self) -> list[Tensor]:
        """Scalar penalties to add to a loss: of the outputs of the last call, then of the weights that require gradients."""
        layers = self._layers()
        penalties = [loss for layer in layers for loss in layer._losses]
        return penalties + [rule(getattr(layer, name)) for layer in layers for name, rule in layer._trained(layer._regularizers)]

    def _trained(self, rules: dict[str, Rule]) -> list[tuple[str, Rule]]:
        """Those of weights that require gradients, themselves or what they are computed from (torch's parametrizations)."""
        return [(name, rule) for name, rule in rules.items() if any(p.requires_grad for p in self._sources(name))]

    def _sources(self, name: str) -> list[Tensor]:
        return list(self.parametrizations[name].parameters()) if is_parametrized(self, name) else [getattr(self, name)]  # type: ignore[union-attr, index]

    @torch.no_grad()
    def apply_constraints(self) -> None:
        """Puts every weight with a constraint that requires gradients back within it; run it after each step of the optimizer, as Keras does."""
        for layer in self._layers():
            for name, constraint in layer._trained(layer._constraints):
                weight = constraint(getattr(layer, name))
                if is_parametrized(layer, name):
                    setattr(layer, name, weight)
                else:
                    getattr(layer, name).copy_(weight)

    def get_config(self) -> Config:
        """Arguments that make the same layer, in the form that Keras reads; callables of the user's own come back as they are."""
        config = {"name": self.name, "trainable": self.trainable, "dtype": self._policy.moved(self.variable_dtype).get_config()}
        if self.activity_regularizer is not None:
            config["activity_regularizer"] = serialized(self.activity_regularizer)
        return config

    @classmethod
    def from_config(cls, config: Config) -> Any:
        """The inverse of ``get_config``; takes the config of Keras' own layer as well."""
        return cls(**config)
