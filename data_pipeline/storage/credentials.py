"""The profile of the AWS tools, which the transport does not read itself: ~/.aws/config and ~/.aws/credentials.

Keys in the environment come first, as in the AWS tools. Nothing of what is read here may appear in a message.
"""

import configparser
import os
from pathlib import Path

from data_pipeline.errors import DataError

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")  # the first that is set counts
ELSEWHERE = ("sso_session", "sso_start_url", "role_arn", "credential_process")  # credentials that other programs make


def s3_options() -> dict[str, str]:
    """What the profile adds to the environment: keys, region and endpoint, under the transport's names.

    DataError if AWS_PROFILE names none, or one whose credentials come from elsewhere.
    """
    name = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    profile = _profile(name or "default")
    if name and not profile:
        raise DataError(
            f"AWS_PROFILE names {name!r}, which ~/.aws/config and ~/.aws/credentials do not have: correct it."
        )
    options: dict[str, str] = {}
    if "AWS_ACCESS_KEY_ID" not in os.environ:
        options |= _keys(name or "default", profile)
    if not {"AWS_REGION", "AWS_DEFAULT_REGION"} & os.environ.keys() and "region" in profile:
        options["region"] = profile["region"]
    if not os.environ.keys() & set(ENDPOINTS) and "endpoint_url" in profile:
        options["endpoint"] = profile["endpoint_url"]
    return options


def _keys(name: str, profile: dict[str, str]) -> dict[str, str]:
    if "aws_access_key_id" in profile and "aws_secret_access_key" in profile:
        keys = {"access_key_id": "aws_access_key_id", "secret_access_key": "aws_secret_access_key"}
        if "aws_session_token" in profile:
            keys["session_token"] = "aws_session_token"
        return {option: profile[key] for option, key in keys.items()}
    found = [key for key in ELSEWHERE if key in profile]
    if found and "AWS_WEB_IDENTITY_TOKEN_FILE" not in os.environ:
        raise DataError(
            f"The AWS profile {name!r} gets its credentials by {found[0]}, which is not read here: run "
            f"`eval $(aws configure export-credentials --profile {name} --format env)` first."
        )
    return {}


def _profile(name: str) -> dict[str, str]:
    section = name if name == "default" else f"profile {name}"
    config = _section(os.environ.get("AWS_CONFIG_FILE", "~/.aws/config"), section)
    return config | _section(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), name)


def _section(path: str, name: str) -> dict[str, str]:
    parser = configparser.RawConfigParser(default_section="", strict=False)
    try:
        parser.read(Path(path).expanduser(), encoding="utf-8")
        broken = False
    except (configparser.Error, UnicodeDecodeError, OSError):
        broken = True  # the error quotes lines of the file, so it must not be chained
    if broken:
        raise DataError(f"{path} cannot be read as a file of AWS profiles: correct it, or use AWS_* variables.")
    return dict(parser[name]) if parser.has_section(name) else {}
