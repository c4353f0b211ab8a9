"""The model that `convert` returns: a traced graph around the original tree of modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from gradl1_fast.nn.twins import copy_structure

__all__ = ["ConvertedModel", "copy_model"]


class ConvertedModel(fx.GraphModule):
    """A ``torch.fx.GraphModule`` that keeps the whole tree of modules it was made from.

    A plain GraphModule drops what its graph does not call; here unused submodules, attributes and
    hooks stay, so that state dicts, ``deepcopy`` and ``pickle`` see the model they know.
    """

    @classmethod
    def assemble(cls, tree: dict[str, Any], graph: fx.Graph, name: str) -> ConvertedModel:
        """Return the model with the attributes ``tree`` of a module and ``graph`` as its forward pass."""
        tree = _tree(tree)  # of a model that was traced before
        root = nn.Module()
        root.__dict__.update(tree)
        model = cls(root, graph, class_name=name)
        model.__dict__.update(tree)
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> ConvertedModel:
        tree = copy.deepcopy(_tree(self.__dict__), memo)
        return ConvertedModel.assemble(tree, copy.deepcopy(self.graph), type(self).__name__)

    def __reduce__(self) -> Any:
        # GraphModule's own way: it pickles the generated source and traces it again.
        return _unpickle, (*super().__reduce__(), type(self).__name__)


def copy_model(model: nn.Module) -> nn.Module:
    """Return a copy of the modules of a model, quantizers among them, around the same parameters."""
    tree = copy_structure(model)
    if not isinstance(model, ConvertedModel):
        return tree
    return ConvertedModel.assemble(tree.__dict__, copy.deepcopy(model.graph), type(model).__name__)


_GRAPH_ATTRIBUTES = set(fx.GraphModule(nn.Module(), fx.Graph()).__dict__) - set(nn.Module().__dict__)


def _tree(attributes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if key not in _GRAPH_ATTRIBUTES}


def _unpickle(rebuild: Callable[..., fx.GraphModule], args: tuple[Any, ...], name: str) -> ConvertedModel:
    return ConvertedModel.assemble(args[0], rebuild(*args).graph, name)
