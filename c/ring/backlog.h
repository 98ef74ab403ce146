/*
 * Frames that found no buffer in a guest's receive ring and wait for one, as the queue of a tap has them wait for QEMU.
 *
 * They are copies. Where a frame comes from (a buffer of the interface, a chain of another guest, what was joined or cut of
 * such) is given back at once, so a guest that takes nothing keeps nobody's memory but a share of the daemon's own, and
 * nobody's frames but its own wait behind them. Bounded in frames, in bytes and in time; memory is mapped when the first
 * frame waits, and unmapped when none has for a while.
 */
#ifndef XN_BACKLOG_H
#define XN_BACKLOG_H

#include "frame/view.h"

enum {
	/* As many as a tap keeps, whose txqueuelen is 1000. */
	BACKLOG_FRAMES = 1024,
	/* Of one guest, shared out evenly to its receive rings. A tap has as many frames of up to 64 KiB. */
	BACKLOG_BYTES = 16 << 20,
	/* So old they are of no use: whoever sent them has sent them again. */
	BACKLOG_US = 1000000
};

struct waiting {
	u64 since; /* cycles */
	u32 at;	   /* its first byte, free-running */
	u32 len;
	struct virtio_net_hdr vnet;
};

struct backlog {
	u32 n; /* frames that wait */
	u32 head;
	u32 used; /* bytes of them */
	u32 end;  /* free-running: where the next one's bytes go */
	u32 room; /* bytes, a power of two */
	u64 last; /* cycles, when one last had to wait */
	struct waiting *frames;
	u8 *bytes; /* NULL: not mapped */
};

/* Has a frame wait, behind the others; false: there is no room for it. */
bool backlog_add(struct backlog *b, const struct view *v, u64 now);
/* Views of the first frames, at most `most`, and no more bytes than one poll moves; two pieces each at `pieces`. */
u32 backlog_peek(const struct backlog *b, u32 most, struct view *views, struct piece *pieces);
/* Done with the first n. */
void backlog_drop(struct backlog *b, u32 n);
/* How many, from the first, have waited for longer than `most`, cycles. */
u32 backlog_overdue(const struct backlog *b, u64 now, u64 most);
void backlog_release(struct backlog *b);

#endif
