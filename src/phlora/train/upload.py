"""`push_to_hub` of `training_config`: the best adapter, with its card, is sent to a hub once the run is complete.

TRL's trainer sends its folder of checkpoints, with a card that knows nothing of the run; it is never asked to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

from phlora.display import Display
from phlora.errors import ConfigError, masked
from phlora.models.locate import first_line
from phlora.train.field_values import WHERE, typed_value

_SWITCH = "push_to_hub"
_FIELDS = ("hub_model_id", "hub_token", "hub_private_repo", "hub_revision")
# Say when TRL sends its checkpoints.
_WHEN = ("hub_strategy", "hub_always_push")


@dataclass(frozen=True)
class Upload:
    """Where an adapter is sent.

    Attributes:
        repo: `owner/name` or a name alone; None: the name of the run folder.
        token: in the place of the one that `hf auth login` keeps.
        private: whether the repository is made a private one; None: as the owner's settings say.
        revision: the branch; None: the main one.
    """

    repo: str | None = None
    token: str | None = field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None

    def settings(self) -> dict[str, Any]:
        """As `training_config` says it; never the token."""
        given = {"hub_model_id": self.repo, "hub_private_repo": self.private, "hub_revision": self.revision}
        return {_SWITCH: True, **{name: value for name, value in given.items() if value is not None}}


def take_upload(values: Mapping[str, Any], notes: list[str]) -> tuple[dict[str, Any], Upload | None]:
    """The settings without what is about sending, and where the adapter is sent; None: nowhere.

    Raises:
        ConfigError: a value of the wrong type.
    """
    if not typed_value(_SWITCH, values.get(_SWITCH), notes):
        return {name: value for name, value in values.items() if name != _SWITCH}, None
    repo, token, private, revision = (typed_value(name, values.get(name), notes) for name in _FIELDS)
    notes += [
        f"{WHERE}.{name}: the best adapter is sent once, when the run is complete"
        for name in (_SWITCH, *_WHEN)
        if name in values
    ]
    others = {name: value for name, value in values.items() if name not in (_SWITCH, *_FIELDS, *_WHEN)}
    return others, Upload(repo, token, private, revision)


def require_sender(upload: Upload | None) -> None:
    """What can be known before hours of training about sending their result.

    Raises:
        ConfigError: nobody is logged in, no hub may be asked, or the name is none.
    """
    if upload is None:
        return
    where = f"{WHERE}.{_SWITCH}"
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            "No hub may be asked (--offline, HF_HUB_OFFLINE), and the adapter should be sent to one",
            where=where,
            fix="leave out one of the two",
        )
    if upload.repo is not None:
        try:
            huggingface_hub.utils.validate_repo_id(upload.repo)
        except HFValidationError as error:
            raise ConfigError(
                f"This is no name of a repository: {error}", where=f"{WHERE}.hub_model_id"
            ) from None
    if not (upload.token or huggingface_hub.get_token()):
        raise ConfigError(
            "The adapter should be sent to a hub, and nobody is logged in",
            where=where,
            fix="hf auth login, or set HF_TOKEN",
        )


def send(adapter: Path, upload: Upload, *, run: Path, display: Display) -> str | None:
    """Send an adapter's folder; a hub that does not take it is told and costs nothing, for the run is complete.

    Returns:
        The address of what was sent, or None.
    """
    repo = upload.repo or re.sub(r"[^\w.-]+", "-", run.name).strip("-.")
    display.stage(f"Sending {adapter} to {repo}")
    try:
        api = HfApi(token=upload.token)
        made = api.create_repo(repo, private=upload.private, exist_ok=True)
        repo = made.repo_id
        if upload.revision is not None:
            api.create_branch(repo, branch=upload.revision, exist_ok=True)
        sent = api.upload_folder(
            repo_id=repo,
            folder_path=str(adapter),
            revision=upload.revision,
            commit_message=f"Adapter of the run {run.name}",
        )
    # Names, rights, quotas, networks and proxies: each has its own kind, and none of them touches the run.
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        display.warn(
            f"The adapter was not sent to {repo}: {masked(first_line(error))}. The run is complete and kept in {run}; "
            f"send it later: hf upload {repo} {adapter}"
        )
        return None
    display.note(f"Sent: {made}")
    return str(getattr(sent, "commit_url", made))
