"""The vhost-user backend: bytes (message), socket (connection), order (session), rings and memory (device)."""
