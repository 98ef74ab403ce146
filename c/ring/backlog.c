#include "backlog.h"

#include <sys/mman.h>

#include "account.h"

enum { FRAMES_SIZE = BACKLOG_FRAMES * sizeof(struct waiting) };

_Static_assert(!(BACKLOG_FRAMES & (BACKLOG_FRAMES - 1)), "a mask wraps the index");
_Static_assert(BACKLOG_BYTES / XN_MAX_PAIRS / 2 >= XN_MAX_FRAME, "any frame has its room in any share");

static struct waiting *frame_at(const struct backlog *b, u32 i)
{
	return &b->frames[(b->head + i) & (BACKLOG_FRAMES - 1)];
}

/* Not from the heap: what is not used yet has no page, and what is given back is gone. */
static bool map(struct backlog *b)
{
	void *p = mmap(NULL, FRAMES_SIZE + b->room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
		       -1, 0);

	if (p == MAP_FAILED)
		return false;
	b->frames = p;
	b->bytes = (u8 *)p + FRAMES_SIZE;
	return true;
}

/* Where so many bytes lie, from `at` on: in two pieces if they go beyond the end. */
static u32 pieces_of(const struct backlog *b, u32 at, u32 len, struct piece *pieces)
{
	u32 start = at & (b->room - 1), first = min_u32(len, b->room - start);

	pieces[0] = (struct piece){b->bytes + start, first};
	pieces[1] = (struct piece){b->bytes, len - first};
	return first < len ? 2 : 1;
}

bool backlog_add(struct backlog *b, const struct view *v, u64 now)
{
	struct piece pieces[2], *to = pieces;
	u32 offset = 0;

	if (b->n == BACKLOG_FRAMES || v->len > b->room - b->used || (!b->bytes && !map(b)))
		return false;
	(void)pieces_of(b, b->end, v->len, pieces);
	view_scatter(&to, &offset, v);
	*frame_at(b, b->n) = (struct waiting){now, b->end, v->len, v->vnet};
	b->end += v->len;
	b->used += v->len;
	b->last = now;
	__atomic_store_n(&b->n, b->n + 1, __ATOMIC_RELAXED);
	return true;
}

u32 backlog_peek(const struct backlog *b, u32 most, struct view *views, struct piece *pieces)
{
	u32 n = 0, bytes = 0;

	for (; n < min_u32(most, b->n) && bytes < POLL_BYTES; n++) {
		const struct waiting *f = frame_at(b, n);
		struct view *v = &views[n];

		v->pieces = &pieces[2 * n];
		v->n = pieces_of(b, f->at, f->len, &pieces[2 * n]);
		v->len = f->len;
		v->vnet = f->vnet;
		v->needs = 0;
		view_snapshot(v);
		bytes += f->len;
	}
	return n;
}

void backlog_drop(struct backlog *b, u32 n)
{
	for (u32 i = 0; i < n; i++)
		b->used -= frame_at(b, i)->len;
	b->head += n;
	__atomic_store_n(&b->n, b->n - n, __ATOMIC_RELAXED);
}

u32 backlog_overdue(const struct backlog *b, u64 now, u64 most)
{
	u32 n = 0;

	/* Signed: another worker's turn may have begun later than this one. */
	while (n < b->n && (s64)(now - frame_at(b, n)->since) > (s64)most)
		n++;
	return n;
}

void backlog_release(struct backlog *b)
{
	if (b->bytes)
		munmap(b->frames, FRAMES_SIZE + b->room);
	*b = (struct backlog){.room = b->room};
}
