/*
 * Makes one frame of several of a flow that came in one burst, for a guest that takes such: the reverse of gso.
 *
 * Nothing is held beyond the burst, and nothing is copied: the payloads stay where they are, as pieces of the first frame.
 * Only what can be cut again into the very same frames is joined. Frames of a flow keep their order.
 */
#ifndef XN_GRO_H
#define XN_GRO_H

#include "view.h"

enum { GRO_FLOWS = 8, GRO_PIECES = XN_BURST * WIRE_PIECES };

/* Memory that the joined frames live in, until the next call. */
struct gro_room {
	struct piece pieces[GRO_PIECES];
};

struct gro_done {
	u32 joined;   /* frames that became part of the one before */
	u32 verified; /* checksums found right */
};

/*
 * views[which[0..n)] came from the wire into memory of ours, each with all headers in its first piece. Joins what the
 * receiver `takes` (enum view_need) and takes it out of `which`; returns how many are left there.
 */
u32 gro_join(struct gro_room *room, struct view *views, u8 *which, u32 n, u8 takes, struct gro_done *done);

#endif
