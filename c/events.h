/*
 * Events: what the core has to tell those outside of it, from any thread: the control thread, by bits and an eventfd of
 * ours, and whoever waits at an eventfd that is not ours. Every part of the core tells it; it knows none.
 */
#ifndef XN_EVENTS_H
#define XN_EVENTS_H

#include "caller.h"

struct events {
	int fd;		      /* readable when there is news */
	u32 bits;	      /* enum xn_event */
	struct caller caller; /* under the lock */
	struct spinlock lock;
};

/* 0, or what caller_init has and eventfd(2). */
int events_init(struct events *e);
/* Of one that could not be made, too; fd is -1 before. */
void events_release(struct events *e);
/* Tells the control thread. */
void events_tell(struct events *e, enum xn_event event);
/* What it was told of since it last asked; the fd is cleared. */
u32 events_take(struct events *e);
/* Signals an eventfd that is not ours (-1: none), at once. */
void events_call(struct events *e, int fd);

#endif
