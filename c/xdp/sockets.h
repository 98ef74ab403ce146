/*
 * AF_XDP sockets before they are anybody's: what takes a privilege, or as long as guests' memory is large. Each is a
 * descriptor that is not bound, of which the UMEM is registered, or is another's that is open.
 */
#ifndef XN_SOCKETS_H
#define XN_SOCKETS_H

#include "memory/arena.h"

int socket_open(struct umem *u, struct arena *a, u32 max_frame, enum xn_zerocopy policy, u32 flags);
/* Registers the UMEM that such a socket would have, unless an open one has it already: it is there when that is opened. */
int socket_prepare(struct arena *a, u32 max_frame, enum xn_zerocopy policy, u32 flags);
/* It was not taken, for this error (below zero): closed, or kept for the next try. */
void socket_give_back(struct umem *u, struct arena *a, int error);

#endif
