"""`Pretrained`: a trained model with all that belongs to it, from a folder or from the hub.

Local folders need nothing but equilibria. What goes to the Hugging Face hub and comes from there
passes through huggingface_hub (`pip install 'equilibria[hub]'`): its `ModelHubMixin` saves and
uploads; what it downloads is a local folder, read like any other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from equilibria.core.errors import UserError
from equilibria.models.config import ModelConfig
from equilibria.pretrained.folder import FILES, Reading, Shared, read_folder, write_folder
from equilibria.tasks.generation import SamplingConfig, generate_batch
from equilibria.train.experiment import Vocabulary

_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


class _Local:
    """What `ModelHubMixin` has, as far as it goes without huggingface_hub."""

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        self._save_pretrained(Path(save_directory))

    def _save_pretrained(self, save_directory: Path) -> None:
        raise NotImplementedError

    def push_to_hub(self, repo_id: str, **_: Any) -> str:
        raise _no_hub(f"pushing to {repo_id}")


if TYPE_CHECKING:
    from huggingface_hub import ModelHubMixin as _Base
else:
    try:
        from huggingface_hub import ModelHubMixin as _Base
    except ImportError:
        _Base = _Local


class Pretrained(_Base):
    """A model of `equilibria.models`, its configuration, vocabulary and card.

    `save_pretrained(folder)` writes it, `from_pretrained(folder or "owner/name")` reads it,
    `push_to_hub("owner/name")` uploads it. Weights are safetensors, everything else is JSON:
    reading runs no code of the folder, and checks names, shapes and types of all tensors against
    the configuration before anything is made of them. Solvers that are classes of other packages
    are refused.

    Args:
        model: built by `config`.
        config: of the model.
        vocabulary_size: number of token ids; None for that of the vocabulary.
        vocabulary: symbols of the ids; None of a model of other things than text.
        reading: lengths of segment and memory, for generation.
        card: text of README.md.

    Raises:
        UserError: neither a vocabulary nor its size.
    """

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Past the mixin's own, which would turn arguments into a configuration of its kind."""
        return object.__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        config: ModelConfig,
        *,
        vocabulary_size: int | None = None,
        vocabulary: Vocabulary | None = None,
        reading: Reading | None = None,
        card: str = "",
    ) -> None:
        if vocabulary_size is None:
            if vocabulary is None:
                raise UserError("give a vocabulary, or its size as vocabulary_size=...")
            vocabulary_size = len(vocabulary)
        self._shared = Shared(model, config, vocabulary_size, vocabulary, reading, card)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._shared.model

    @property
    def config(self) -> ModelConfig:
        """Its configuration."""
        return self._shared.config

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Symbols of its token ids."""
        return self._shared.vocabulary

    @property
    def reading(self) -> Reading | None:
        """How many positions it reads at a time."""
        return self._shared.reading

    @property
    def card(self) -> str:
        """Its model card."""
        return self._shared.card

    def generate(
        self,
        *prompts: str,
        sampling: SamplingConfig = SamplingConfig(),
        memory_length: int | None = None,
        stop: int | None = None,
    ) -> tuple[str, ...]:
        """Continue texts; see `equilibria.tasks.generation.generate_batch`.

        Raises:
            UserError: a model without vocabulary.
        """
        vocabulary = self.vocabulary
        if vocabulary is None:
            raise UserError(
                "the model came without a vocabulary, so text cannot become token ids; call "
                "equilibria.tasks.generation.generate_batch with ids"
            )
        context = (self.reading or Reading()).context if memory_length is None else memory_length
        model: Any = self.model
        ids = [vocabulary.encode(prompt) for prompt in prompts]
        generated = generate_batch(model, ids, context, sampling, stop=stop)
        return tuple(vocabulary.decode(new) for new in generated.tokens)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Read a folder, or download one from the hub and read it.

        Not by the mixin's own method, which reads the configuration before it can be checked.

        Args:
            pretrained_model_name_or_path: a folder, else "owner/name" on the hub.
            force_download: as of huggingface_hub, like all that follow.
            token: for private models.
            cache_dir: where downloads are kept.
            local_files_only: look into the cache alone.
            revision: branch, tag or commit.

        Raises:
            UserError: as of `read_folder`; no such folder, and no download.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = _downloaded(
                str(pretrained_model_name_or_path),
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                revision=revision,
            )
        shared = read_folder(folder)
        return cls(
            shared.model,
            shared.config,
            vocabulary_size=shared.vocabulary_size,
            vocabulary=shared.vocabulary,
            reading=shared.reading,
            card=shared.card,
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        write_folder(save_directory, self._shared)

    def generate_model_card(self, *_: Any, **__: Any) -> Any:
        """The card for the mixin, which asks where `save_pretrained` has written none."""
        from huggingface_hub import ModelCard

        return ModelCard(self.card or "---\nlibrary_name: equilibria\n---\n")


def _downloaded(name: str, **options: Any) -> Path:
    """The local folder of a model on the hub."""
    if not _REPOSITORY.fullmatch(name):
        raise UserError(
            f"{name!r} is neither a folder here nor OWNER/NAME of a model on the hub; give the "
            "folder that 'equilibria share' has written"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise _no_hub(f"there is no folder {name}, and downloading") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES), **options))
    except Exception as error:
        # huggingface_hub passes on whatever the layers below it raise
        raise UserError(
            f"there is no folder {name}, and {name} cannot be downloaded from the hub "
            f"({reason(error)}); check the name and the connection"
        ) from error


def reason(error: Exception) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}"


def _no_hub(what: str) -> UserError:
    return UserError(
        f"{what} needs the package huggingface_hub: pip install 'equilibria[hub]'; folders on this "
        "machine can be saved and loaded without it"
    )
