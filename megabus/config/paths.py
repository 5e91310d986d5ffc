"""Paths in a YAML file, which no shell has read."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from megabus.pathname import expanded

Pathname = Annotated[str, AfterValidator(expanded)]
