"""What travels between a cache server and its clients, without the sockets; README.md has the pages of bytes."""
