/*
 * Lending: chains of a transmit ring that sockets have, and their way back to the guest.
 */
#ifndef XN_LENDING_H
#define XN_LENDING_H

#include "ring/vring.h"
#include "xsk.h"

/* Hands back chains whose loans have ended; returns how many. A socket that has had one for too long is taken to be stuck. */
u32 lending_take_back(struct virtqueue *q, u64 now);

#endif
