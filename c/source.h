/*
 * A source: something that a worker takes frames from (a transmit ring, an AF_XDP socket, a group socket; a receive ring,
 * for which frames wait).
 *
 * An active source is polled on every turn. One that has brought nothing for the spin time is armed (it says where it
 * wants to be woken) and sleeps in the worker's epoll set; while other sources keep the worker busy, that set is looked at
 * now and then, so idle sources cost a busy one nothing.
 */
#ifndef XN_SOURCE_H
#define XN_SOURCE_H

#include "base.h"

struct account;
struct worker;
struct source;

struct source_ops {
	/* Moves one burst; the number of frames or chains taken. */
	u32 (*poll)(struct worker *w, struct source *s);
	/* Asks to be woken. True: there is work after all. NULL: the fd alone tells. */
	bool (*arm)(struct source *s);
	/* Woken: stop asking. NULL: nothing to do. */
	void (*disarm)(struct source *s);
};

struct source {
	const struct source_ops *ops;
	struct worker *worker;
	struct account *account; /* of its port, with that worker */
	u32 slot;		 /* in the worker's list of sources */
	u32 queue;		 /* of its port; of a guest the ring */
	u32 place;		 /* place_of() them */
	int fd;			 /* what wakes it; -1: it is polled for ever */
	bool active;
	bool spins; /* polled for a time after its last frame; else until it is empty */
	bool dead;  /* brings nothing until it is asked, or added anew: not even without an fd is it polled for ever */
	bool asked; /* by whoever, to be polled */
	bool unwatched;	 /* while it is active its fd is not in the epoll set, where each wake-up takes a lock */
	bool woken;	 /* by its fd, since it last brought something */
	u64 last_work;	 /* cycles */
	u64 spin;	 /* cycles that it is polled after its last frame; follows what its traffic is like */
	uint64_t *kicks; /* counts wake-ups by the fd; NULL: nobody asks */

	/* Of a source that spins: a stream of much data, or a conversation, where one side waits for the other? */
	const uint64_t *bytes[2]; /* counters of what it and its opposite direction move */
	u64 weighed;		  /* cycles, when they were last added up */
	u64 weighed_bytes;	  /* their sum then */
	bool streams;		  /* what came of it */
};

#endif
