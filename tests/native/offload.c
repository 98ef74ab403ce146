/*
 * Joins frames as a burst from the wire, and cuts what became of them, for a test in Python.
 *
 * Every frame lies in memory of its own, of exactly its size, so that a sanitizer sees a byte too far.
 */
#include <stdlib.h>

#include "frame/csum.h"
#include "frame/gro.h"
#include "frame/gso.h"
#include "frame/partial.h"
#include "frame/vnet.h"

#define API __attribute__((visibility("default")))

/* Frames on their way out: lengths in n entries, bytes one behind the other. */
struct out {
	u32 n;
	u32 lengths[8192];
	struct virtio_net_hdr_mrg_rxbuf headers[8192];
	u32 used;
	u8 bytes[1 << 20];
};

static void put(struct out *out, const struct view *v)
{
	if (out->n == ARRAY_LEN(out->lengths) || v->len > sizeof(out->bytes) - out->used)
		abort();
	out->headers[out->n] = vnet_header(v, 1);
	out->lengths[out->n++] = v->len;
	view_copy(out->bytes + out->used, v);
	out->used += v->len;
}

/* The frame in pieces: the first has all headers, the others `piece` bytes (0: there are none). */
static void open_frame(struct view *v, struct piece *pieces, const u8 *frame, u32 len, u32 piece)
{
	u32 n = piece ? min_u32(len, PACKET_HEADERS) : len;

	*v = (struct view){.pieces = pieces, .len = len};
	for (u32 at = 0; at < len; at += n, n = min_u32(piece, len - at)) {
		u8 *copy = malloc(n);

		if (!copy || v->n == WIRE_PIECES)
			abort();
		memcpy(copy, frame + at, n);
		pieces[v->n++] = (struct piece){copy, n};
	}
	partial_find(v);
	view_snapshot(v);
}

/* Fills `joined` and, of these, `cut`; returns the checksums found right, by `which` ones the frames that were left. */
API u32 offload_join(const u8 *frames, const u32 *lengths, u32 n, u32 piece, u8 takes, struct out *joined,
		     struct out *cut, u8 *which)
{
	static struct gro_room join_room;
	static struct gso_room cut_room;
	static struct piece pieces[XN_BURST][WIRE_PIECES];
	static struct view views[XN_BURST];
	u8 *memory[XN_BURST][WIRE_PIECES] = {0};
	struct gro_done done = {0};

	joined->n = joined->used = cut->n = cut->used = 0;
	for (u32 i = 0; i < n; frames += lengths[i++]) {
		open_frame(&views[i], pieces[i], frames, lengths[i], piece);
		for (u32 p = 0; p < views[i].n; p++)
			memory[i][p] = pieces[i][p].ptr;
		which[i] = (u8)i;
	}
	u32 left = gro_join(&join_room, views, which, n, takes, &done);

	if (left + done.joined != n)
		abort();
	for (u32 i = 0; i < left; i++) {
		struct view *v = &views[which[i]];
		struct gso g;
		u32 made;

		put(joined, v);
		if (!(v->needs & NEED_CUT)) {
			if (v->needs)
				csum_complete(v);
			put(cut, v);
			continue;
		}
		gso_start(&g, v);
		while ((made = gso_next(&g, &cut_room)))
			for (u32 s = 0; s < made; s++) {
				csum_complete(&cut_room.views[s]);
				put(cut, &cut_room.views[s]);
			}
	}
	for (u32 i = 0; i < n; i++)
		for (u32 p = 0; p < WIRE_PIECES; p++)
			free(memory[i][p]);
	return done.verified;
}
