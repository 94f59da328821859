"""Output on disk: places that are refused, directories that are ours, writes that are whole or not at all."""

from .disk import disk_errors, sync_tree, write_synced
from .names import ANYTHING, MARKERS, OWNER, Names, marker, remove_own
from .targets import check_file_target, check_target, partial_of, require_apart, user_path
from .workspace import Workspace, atomic_directory, atomic_file, was_published, workspace_names, write_whole

__all__ = [
    "ANYTHING",
    "MARKERS",
    "OWNER",
    "Names",
    "Workspace",
    "atomic_directory",
    "atomic_file",
    "check_file_target",
    "check_target",
    "disk_errors",
    "marker",
    "partial_of",
    "remove_own",
    "require_apart",
    "sync_tree",
    "user_path",
    "was_published",
    "workspace_names",
    "write_synced",
    "write_whole",
]
