/*
 * The data path against hostile guests: the real core, its workers run a turn at a time on the target's own thread, with up
 * to four guests and two interfaces. An input is a program of their drivers (see README.md); its rings are valid, but where
 * it says what shall be wrong. In between, what must hold of the core whatever they do is checked.
 *
 * Built with ORACLE, a load of guest memory may see other bytes than are there: a guest that stores at every moment.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernel.h"
#include "packets.h"
#include "port/guest.h"
#include "port/netdev.h"

enum {
	GUESTS = 4,
	NETDEVS = 2,
	PAIRS = 2,
	MEMORY = 512 * 1024,
	RING_ROOM = 28 * 1024,
	TABLES = 2 * PAIRS * RING_ROOM,
	TABLES_END = 0x40000,
	BUFFERS = TABLES_END,
	MOST_NUM = 1024,
	MOST_PIECES = 2048,
	MOST_REGIONS = 16,
	MOST_OPS = 32,
	FRAMES = XN_MIN_FRAMES
};

/* A stretch of a chain, as its driver has it. */
struct segment {
	u64 addr;
	u32 len;
};

/* What a chain took of its ring. */
struct posted {
	u16 descs;
	bool breaks; /* it must never be handed back */
	struct cursor after;
};

struct ring {
	u32 num;
	u32 offset; /* in memory */
	u32 desc, avail, used;
	bool is_packed;
	bool started;
	struct cursor next; /* packed: to make available from; split: the available index */
	struct cursor done; /* what the core had handed back when last looked */
	u16 free;	    /* descriptors */
	u16 at;		    /* split: the next free one */
	struct posted posted[2 * MOST_NUM];
	u32 head, tail;
};

struct guest_of {
	int port;
	int fd;
	u8 *memory;
	struct xn_region regions[MOST_REGIONS];
	u32 regions_n;
	u64 features;
	u32 pairs;
	bool checked;
	u32 table, buffer; /* to be used next */
	struct ring rings[2 * PAIRS];
};

/* Something that a guest's second processor does at a moment of the core's choosing. */
struct race {
	const void *at; /* when this is loaded; NULL: after so many loads */
	u32 after;
	u8 *to;
	u32 n;
	u32 step;  /* from one place to the next */
	u32 times; /* places */
	u8 bytes[16];
	u32 repeats;
};

static const u8 macs[GUESTS + 1 + NETDEVS][6] = {
	{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}, {2, 0, 0, 0, 0, 3}, {2, 0, 0, 0, 0, 4}, {2, 9, 0, 0, 0, 1}};
enum { FAR = GUESTS };

static struct xn_bridge *bridge;
static struct guest_of guests[GUESTS];
static u32 guests_n;
static int netdevs[NETDEVS];
static u32 netdevs_n;
static int kick_fd = -1, call_fd = -1;
static struct race races[4];
static u32 races_n;
static struct input *racing; /* where an oracle's bytes come from; NULL: loads are what they are */
static u32 oracle_rate;
static u32 chance;
/* Whether memory may no longer be what was posted. */
static bool disturbed;
static u32 tick_us; /* that pass from turn to turn */
static u64 delivered, runs, moving;

_Noreturn void fuzz_found(const char *what, const char *file, int line)
{
	fprintf(stderr, "FOUND: %s does not hold, %s:%d\n", what, file, line);
	abort();
}

/* ---- what a guest does while it is read ---- */

static void run_race(struct race *r)
{
	for (u32 i = 0; i < r->times; i++)
		memcpy(r->to + (u64)i * r->step, r->bytes, r->n);
	if (r->repeats)
		r->repeats--;
	else
		r->to = NULL;
}

#ifdef ORACLE
static void change(u8 *loaded, size_t n)
{
	u8 how = take8(racing), where = take8(racing);
	u8 *byte = &loaded[where % n];

	switch (how % 6) {
	case 0:
		*byte ^= (u8)(1u << (how >> 5));
		break;
	case 1:
		*byte = take8(racing);
		break;
	case 2:
		for (size_t i = 0; i < n && i < 16; i++)
			loaded[i] = take8(racing);
		break;
	case 3:
		*byte = 0;
		break;
	case 4:
		*byte = 0xff;
		break;
	default:
		*byte = (u8)(*byte + 1);
	}
}
#endif

void oracle_loaded(const void *guest, void *loaded, size_t n)
{
	for (u32 i = 0; i < races_n; i++) {
		struct race *r = &races[i];

		if (r->to && (r->at ? r->at == guest : !r->after--))
			run_race(r);
	}
#ifdef ORACLE
	if (!racing || !oracle_rate || !n)
		return;
	chance = chance * 1664525 + 1013904223;
	if (chance >> 24 < oracle_rate && racing->left && kernel_is_guest(guest))
		change(loaded, n);
#else
	(void)loaded, (void)n, (void)racing, (void)oracle_rate, (void)chance;
#endif
}

/* ---- guest memory ---- */

static u64 guest_addr(const struct guest_of *g, u32 offset)
{
	for (u32 i = 0; i < g->regions_n; i++)
		if (offset - g->regions[i].offset < g->regions[i].size)
			return g->regions[i].guest_addr + (offset - g->regions[i].offset);
	return 0xdead0000 + offset;
}

static u64 user_addr(const struct guest_of *g, u32 offset)
{
	for (u32 i = 0; i < g->regions_n; i++)
		if (offset - g->regions[i].offset < g->regions[i].size)
			return g->regions[i].user_addr + (offset - g->regions[i].offset);
	return 0;
}

static void add_region(struct guest_of *g, u64 addr, u32 from, u32 to)
{
	g->regions[g->regions_n] = (struct xn_region){.guest_addr = addr,
						      .size = to - from,
						      .user_addr = 0x7f0000000000 + 2ull * from,
						      .offset = from,
						      .fd = g->fd};
	g->regions_n++;
}

/*
 * The same memory in other tables: in one, in several that are neighbours or not, at odd places, at the top of all addresses,
 * or with a part of it left out.
 */
static void lay_out(struct guest_of *g, u8 kind)
{
	const u64 base = 0x100000;

	g->regions_n = 0;
	switch (kind & 7) {
	case 1:
		add_region(g, base, 0, 0x50000);
		add_region(g, base + 0x50000, 0x50000, MEMORY);
		break;
	case 2:
		add_region(g, 0, 0, 0x28000);
		add_region(g, 0x28000, 0x28000, 0x48011);
		add_region(g, 0x48011, 0x48011, 0x48801);
		add_region(g, 0x48801, 0x48801, MEMORY - 5);
		break;
	case 3:
		add_region(g, 1ull << 32, 0x40000, MEMORY);
		add_region(g, base, 0, 0x40000);
		break;
	case 4:
		add_region(g, 0, 0, MEMORY - 24);
		break;
	case 5:
		add_region(g, base, 0, TABLES_END - 8);
		for (u32 i = 0, at = TABLES_END - 8; i < MOST_REGIONS - 1; i++, at += 0x4321)
			add_region(g, base + at, at, i == MOST_REGIONS - 2 ? MEMORY : at + 0x4321);
		break;
	case 6:
		add_region(g, -(u64)MEMORY - 4096, 0, MEMORY);
		break;
	case 7:
		add_region(g, base + 0x48000, 0x48000, 0x50000);
		g->regions[0].left_out = true;
		g->regions[0].fd = -1;
		add_region(g, base, 0, 0x48000);
		add_region(g, base + 0x50000, 0x50000, MEMORY);
		break;
	default:
		add_region(g, base, 0, MEMORY);
	}
}

/* What is behind a region in its last page is nobody's. */
static void poison_ends(const struct guest_of *g)
{
	const struct guest *of = guest_at(bridge, (u32)g->port);
	const struct mem *m = of ? of->mem : NULL;

	for (u32 i = 0; m && i < m->n; i++) {
		const struct region *r = &m->regions[i];
		const u8 *end = r->host + r->size, *all = r->mapping->base + r->mapping->length;

		kernel_guard(end, (u64)(all - end), true);
	}
}

static void set_memory(struct guest_of *g)
{
	if (!xn_guest_set_memory(bridge, (u32)g->port, g->regions, g->regions_n))
		poison_ends(g);
}

/* ---- rings ---- */

static struct virtqueue *core_ring(const struct guest_of *g, const struct ring *r)
{
	struct guest *of = guest_at(bridge, (u32)g->port);

	return of && (u32)(r - g->rings) < 2 * of->pairs ? &of->rings[r - g->rings] : NULL;
}

static void start_ring(struct guest_of *g, struct ring *r, u16 base)
{
	struct xn_ring_config config = {
		.num = r->num, .base = base, .kick_fd = kick_fd, .call_fd = call_fd, .err_fd = -1};

	memset(g->memory + r->offset, 0, RING_ROOM);
	r->is_packed = g->features >> VIRTIO_F_RING_PACKED & 1;
	r->desc = r->offset;
	r->avail = r->offset + 16 * r->num;
	r->used = r->avail + (r->is_packed ? 4 : (2 * r->num + 6 + 3) / 4 * 4);
	config.desc_addr = user_addr(g, r->desc);
	config.avail_addr = user_addr(g, r->avail);
	config.used_addr = user_addr(g, r->used);
	if (r->is_packed) {
		/* The wrap counter begins with one. */
		base = (u16)(base % r->num);
		config.base = base | 1u << 15;
		/* As if all before had been used: a ring tells by that where it stands. */
		for (u32 i = 0; i < base; i++) {
			const u16 flags = packed_used_flags(1);

			memcpy(g->memory + r->desc + 16 * i + 14, &flags, sizeof(flags));
		}
		r->next = (struct cursor){base, 1};
	} else {
		config.base = base;
		memcpy(g->memory + r->used + 2, &base, 2);
		memcpy(g->memory + r->avail + 2, &base, 2);
		r->next = (struct cursor){base, 0};
	}
	r->done = r->next;
	r->at = 0;
	r->head = r->tail = 0;
	r->free = (u16)r->num;
	r->started = !xn_ring_start(bridge, (u32)g->port, (u32)(r - g->rings), &config);
	(void)xn_ring_enable(bridge, (u32)g->port, (u32)(r - g->rings), 1);
}

/* Chains that the core has handed back, in the order in which they came, are free again. */
static void take_used(const struct guest_of *g, struct ring *r)
{
	const struct virtqueue *q = core_ring(g, r);

	if (!q)
		return;
	while (r->head != r->tail && !cursor_is(r->done, q->used)) {
		const struct posted *p = &r->posted[r->head++ % ARRAY_LEN(r->posted)];

		MUST(!p->breaks || disturbed);
		r->free = (u16)(r->free + p->descs);
		r->done = p->after;
	}
}

static void put_desc(u8 *to, u64 addr, u32 len, u16 a, u16 b)
{
	memcpy(to, &addr, 8);
	memcpy(to + 8, &len, 4);
	memcpy(to + 12, &a, 2);
	memcpy(to + 14, &b, 2);
}

/* Something that is wrong with one descriptor, and with which. */
struct wrong {
	u8 kind; /* 0: nothing */
	u8 at;
	u64 value;
};

static struct wrong take_wrong(struct input *in)
{
	struct wrong w = {.kind = (u8)(1 + take8(in) % 15), .at = take8(in)};

	w.value = take64(in);
	return w;
}

/* In a descriptor: split has flags and then next, packed has the id and then flags. */
static void spoil(const struct guest_of *g, const struct wrong *w, u8 *desc, bool packed, u32 num)
{
	u8 *flags = desc + (packed ? 14 : 12), *next = desc + (packed ? 12 : 14);
	const struct xn_region *last = &g->regions[w->value % g->regions_n];
	u64 addr;
	u16 half;

	switch (w->kind) {
	case 1:
		memcpy(desc, &w->value, 8);
		break;
	case 2: /* right before the end of a region */
		addr = last->guest_addr + last->size - (w->value >> 8 & 31);
		memcpy(desc, &addr, 8);
		break;
	case 3:
		memcpy(desc + 8, &w->value, 4);
		break;
	case 4:
		memset(desc + 8, 0, 4);
		break;
	case 5:
		memcpy(next, &w->value, 2);
		break;
	case 6:
		half = (u16)(num + w->value % 3);
		memcpy(next, &half, 2);
		break;
	case 7:
		*flags ^= VRING_DESC_F_NEXT;
		break;
	case 8:
		*flags ^= VRING_DESC_F_WRITE;
		break;
	case 9:
		*flags ^= VRING_DESC_F_INDIRECT;
		break;
	case 10:
		flags[0] ^= (u8)w->value;
		break;
	case 11: /* not available, in a packed ring */
		flags[0] ^= 0x80;
		break;
	case 12: /* an odd length, or a table of part of an entry */
		desc[8] ^= (u8)(1 + w->value % 31);
		break;
	case 13: /* a chain that returns to where it was */
		*flags |= VRING_DESC_F_NEXT;
		half = (u16)(w->value % num);
		memcpy(next, &half, 2);
		break;
	case 14:
		addr = guest_addr(g, (u32)(w->value % MEMORY));
		memcpy(desc, &addr, 8);
		break;
	default: /* an odd place */
		desc[0] ^= (u8)w->value;
	}
}

/* Writes the chain's table into memory; its address, 0: no room. */
static u64 put_table(struct guest_of *g, const struct segment *segments, u32 n, bool writable, bool packed, bool odd,
		     const struct wrong *wrong)
{
	u32 at = g->table + (odd ? 4 : 0);

	if (at + 16 * n > TABLES_END) {
		at = g->table = TABLES;
		if (16 * n > TABLES_END - TABLES)
			return 0;
	}
	for (u32 i = 0; i < n; i++) {
		u8 *d = g->memory + at + 16 * i;
		u16 flags = writable ? VRING_DESC_F_WRITE : 0;

		if (packed)
			put_desc(d, segments[i].addr, segments[i].len, 0, flags);
		else
			put_desc(d, segments[i].addr, segments[i].len, flags | (i + 1 < n ? VRING_DESC_F_NEXT : 0),
				 (u16)(i + 1));
		if (wrong->kind && wrong->at % n == i)
			spoil(g, wrong, d, packed, n);
	}
	g->table = at + 16 * n;
	g->table = (g->table + 15) / 16 * 16;
	return guest_addr(g, at);
}

/* Makes a chain available; false: the ring has no room for it. */
static bool post(struct guest_of *g, struct ring *r, const struct segment *segments, u32 n, bool writable, bool table,
		 const struct wrong *wrong, bool breaks)
{
	const u16 id = r->is_packed ? r->next.pos : r->at;
	struct cursor at = r->next;

	if (!r->started || n > r->free || r->tail - r->head == ARRAY_LEN(r->posted))
		return false;
	for (u32 i = 0; i < n; i++) {
		u32 slot = r->is_packed ? at.pos : r->at;
		u8 *d = g->memory + r->desc + 16 * slot;
		u16 flags = (u16)((writable && !table ? VRING_DESC_F_WRITE : 0) | (table ? VRING_DESC_F_INDIRECT : 0) |
				  (i + 1 < n ? VRING_DESC_F_NEXT : 0));

		r->at = (u16)((r->at + 1) % r->num);
		if (r->is_packed) {
			put_desc(d, segments[i].addr, segments[i].len, id, flags | packed_avail_flags(at.wrap));
			at.pos++;
			if (at.pos == r->num)
				at = (struct cursor){0, at.wrap ^ 1};
		} else {
			put_desc(d, segments[i].addr, segments[i].len, flags, r->at);
		}
		if (wrong->kind && wrong->at % n == i)
			spoil(g, wrong, d, r->is_packed, r->num);
	}
	if (!r->is_packed) {
		u16 *ring = (u16 *)(g->memory + r->avail + 4), *index = (u16 *)(g->memory + r->avail + 2);

		ring[at.pos % r->num] = id;
		at.pos++;
		*index = at.pos;
		/* A head or an index that is none. */
		if (wrong->kind == 6 && wrong->value >> 32 & 1)
			ring[(u16)(at.pos - 1) % r->num] = (u16)(r->num + (wrong->value >> 40) % (65536 - r->num));
		if (wrong->kind == 5 && wrong->value >> 32 & 1)
			*index = (u16)(at.pos + (wrong->value >> 40));
	}
	r->free = (u16)(r->free - n);
	r->posted[r->tail++ % ARRAY_LEN(r->posted)] = (struct posted){(u16)n, breaks, at};
	r->next = at;
	return true;
}

/* ---- chains of a shape ---- */

struct shape {
	u32 pieces;
	bool table;
	bool odd;     /* the table's place */
	bool empties; /* descriptors of no bytes among the others */
	bool at_end;  /* its buffers are the last of the memory */
	u8 sizes;
};

static struct shape take_shape(struct input *in)
{
	static const u16 pieces[] = {1, 1, 2, 1024, 3, 17, 64, 2040};
	u8 a = take8(in), b = a & 0x40 ? take8(in) : 0;

	return (struct shape){.pieces = pieces[a & 7],
			      .table = a >> 3 & 1,
			      .sizes = a >> 4 & 3,
			      .at_end = a >> 7,
			      .odd = b & 1,
			      .empties = b & 2};
}

static u32 take_count(u8 choice)
{
	static const u8 counts[] = {1, 4, 2, 7, 16, 48, 64, 255};

	return counts[choice & 7];
}

/* Room in the memory for so many bytes. */
static u32 reserve(struct guest_of *g, u32 n, bool at_end)
{
	const struct xn_region *last = &g->regions[0];
	u32 end = MEMORY;

	for (u32 i = 0; i < g->regions_n; i++)
		if (g->regions[i].offset > last->offset)
			last = &g->regions[i];
	end = (u32)(last->offset + last->size);
	if (at_end)
		return end - n;
	if (g->buffer + n > end)
		g->buffer = BUFFERS;
	u32 at = g->buffer;

	g->buffer += (n + 63) / 64 * 64;
	return at;
}

/* Cuts `len` bytes at `offset` into a chain of the shape; returns how many segments. */
static u32 cut(const struct guest_of *g, const struct shape *s, u32 offset, u32 len, u32 most, struct segment *out)
{
	u32 pieces = s->pieces < most ? s->pieces : most, n = 0;

	for (u32 i = 0; i < pieces && n < most; i++) {
		u32 left = pieces - i, part = len / left;

		if (s->empties && i % 2 && n + 1 < most)
			out[n++] = (struct segment){guest_addr(g, offset), 0};
		if (s->sizes == 1 && left > 1)
			part = min_u32(len, 1);
		else if (s->sizes == 2 && !i && left > 1)
			part = min_u32(len, 12);
		else if (s->sizes == 3 && left > 1)
			part = min_u32(len, 61);
		out[n++] = (struct segment){guest_addr(g, offset), part};
		offset += part;
		len -= part;
	}
	return n;
}

/*
 * What no device may take: a descriptor of the other direction, a chain of which a part is not available, an id or a next
 * that is none.
 */
static bool breaks(const struct guest_of *g, const struct ring *r, const struct wrong *wrong, u32 n, bool writable,
		   bool table)
{
	const u32 at = n ? wrong->at % n : 0;

	/* Of more pieces than are gathered, or behind one that is left out, the rest is not looked at. */
	if (n > 256 || g->regions[0].left_out)
		return false;
	switch (wrong->kind) {
	case 6:
		return !table && (r->is_packed ? at == n - 1 : at < n - 1);
	case 8:
		return !(r->is_packed && table && !writable);
	case 11:
		return r->is_packed && !table && at;
	default:
		return false;
	}
}

static u32 post_chain(struct guest_of *g, struct ring *r, const struct shape *s, u32 offset, u32 len, bool writable,
		      const struct wrong *wrong, u32 count)
{
	static struct segment segments[MOST_PIECES + 64];
	const struct wrong none = {0};
	bool table = s->table && g->features >> VIRTIO_RING_F_INDIRECT_DESC & 1;
	u32 most = table ? min_u32(MOST_PIECES, 16 * r->num) : r->free, n, done = 0;

	if (!most)
		return 0;
	n = cut(g, s, offset, len, min_u32(most, ARRAY_LEN(segments)), segments);
	if (table) {
		bool in_ring = wrong->kind && wrong->value >> 62;
		struct segment one = {
			put_table(g, segments, n, writable, r->is_packed, s->odd, in_ring ? &none : wrong), 16 * n};

		bool is_wrong = !in_ring && breaks(g, r, wrong, n, writable, true);

		while (done < count && post(g, r, &one, 1, writable, true, in_ring && !done ? wrong : &none, is_wrong))
			done++;
		return done;
	}
	bool is_wrong = breaks(g, r, wrong, n, writable, false);

	while (done < count && post(g, r, segments, n, writable, false, done == count / 2 ? wrong : &none,
				    done == count / 2 && is_wrong))
		done++;
	return done;
}

/* ---- what drivers do ---- */

static void post_buffers(struct input *in, struct guest_of *g, struct ring *r)
{
	static const u32 capacities[] = {1600, 72, 4200, 70000, 300, 12, 1024, 1};
	u8 how = take8(in);
	struct shape s = take_shape(in);
	struct wrong wrong = {0};
	u32 len = s.sizes == 1 ? s.pieces : capacities[how >> 3 & 7];
	u32 count = take_count(how);

	if (how >> 6 == 3)
		wrong = take_wrong(in);
	if (len > 32768)
		count = min_u32(count, 16);
	take_used(g, r);
	(void)post_chain(g, r, &s, reserve(g, len, s.at_end), len, true, &wrong, count);
}

/* What a hostile driver would post: plain buffers, chains as long as may be, and whatever else. */
static void post_groups(struct input *in, struct guest_of *g, struct ring *r, u32 n)
{
	const struct wrong none = {0};

	for (; n; n--) {
		u8 how = take8(in);
		struct shape s = {.pieces = 1};
		u32 len = 1600;

		if ((how & 3) == 3) {
			post_buffers(in, g, r);
			continue;
		}
		if ((how & 3) == 2)
			s = take_shape(in);
		else if (how & 1)
			s = (struct shape){.pieces = MOST_NUM, .table = true, .sizes = 1};
		if (s.sizes == 1)
			len = s.pieces;
		(void)post_chain(g, r, &s, reserve(g, len, how & 0x80), len, true, &none, take_count(how >> 2));
	}
}

static void send_frames(struct input *in, u32 index, struct ring *r)
{
	static u8 frame[PACKET_ROOM];
	struct guest_of *g = &guests[index];
	const struct stations stations = {macs, FAR + 1, index};
	u8 how = take8(in);
	struct shape s = take_shape(in);
	struct wrong wrong = {0};
	struct virtio_net_hdr_mrg_rxbuf hdr = {0};
	u32 header = g->features >> VIRTIO_F_VERSION_1 & 1 || g->features >> VIRTIO_NET_F_MRG_RXBUF & 1 ? 12 : 10;
	u32 len = packet_make(in, &stations, frame, &hdr.hdr), at = reserve(g, header + len, s.at_end);

	if (how >> 5 == 7)
		wrong = take_wrong(in);
	memcpy(g->memory + at, &hdr, header);
	memcpy(g->memory + at + header, frame, len);
	take_used(g, r);
	(void)post_chain(g, r, &s, at, header + len, false, &wrong, take_count(how));
}

static void receive_frames(struct input *in, u32 index)
{
	static u8 frame[PACKET_ROOM];
	const struct stations stations = {macs, FAR + 1, FAR};
	u8 how = take8(in), wrong = how >> 5 == 7 ? 1 + take8(in) % 5 : 0;
	u64 value = wrong ? take64(in) : 0;
	struct virtio_net_hdr hdr;
	u32 len, count = take_count(how);

	len = packet_make(in, &stations, frame, &hdr);
	if (how & 8) {
		kernel_receive_group(&hdr, frame, len, how & 16 ? 0x81000000u | take16(in) : 0);
		return;
	}
	for (u32 i = 0; i < count; i++) {
		kernel_receive(xn_netdev_queue_fd(bridge, (u32)netdevs[index], 0), frame, min_u32(len, 9234),
			       i == count / 2 ? wrong : 0, value);
		/* A stream: what follows is the next part of it. */
		if (len > 60 && frame[12] == 8 && frame[23] == 6) {
			store_be32(frame + 38, load_be32(frame + 38) + len - 54);
			store_be16(frame + 18, load_be16(frame + 18) + 1u);
		}
	}
}

/* ---- interfaces ---- */

static void open_netdev(u32 i, u8 flags)
{
	(void)xn_netdev_open_queue(bridge, (u32)netdevs[i], 0, 1 + i, flags & 1 ? 9234 : 1518, bridge->arena.zerocopy,
				   flags >> 1 & 7);
}

/* Memory that came after the socket is in none of its UMEM: as the daemon does, it is opened anew. */
static void renew_netdevs(u8 flags)
{
	for (u32 i = 0; i < netdevs_n; i++) {
		(void)xn_netdev_close_queue(bridge, (u32)netdevs[i], 0);
		open_netdev(i, flags);
	}
}

/* ---- guests come and go ---- */

static void add_guest(struct input *in, u32 index)
{
	static const u16 sizes[16] = {256, 32, 8, 1024, 64, 2, 1, 16, 512, 4, 128, 256, 32, 256, 256, 256};
	static const u16 odd_sizes[16] = {256, 32, 48, 1000, 63, 1, 3, 7, 512, 30, 100, 5, 33, 256, 17, 255};
	const u64 host = 1ull << VIRTIO_NET_F_CSUM | 1ull << VIRTIO_NET_F_HOST_TSO4 | 1ull << VIRTIO_NET_F_HOST_TSO6 |
			 1ull << VIRTIO_NET_F_HOST_ECN | 1ull << VIRTIO_NET_F_HOST_UFO | 1ull << 56;
	const u64 guest = 1ull << VIRTIO_NET_F_GUEST_CSUM | 1ull << VIRTIO_NET_F_GUEST_TSO4 |
			  1ull << VIRTIO_NET_F_GUEST_TSO6 | 1ull << VIRTIO_NET_F_GUEST_ECN |
			  1ull << VIRTIO_NET_F_GUEST_UFO | 1ull << 54 | 1ull << 55;
	struct guest_of *g = &guests[index];
	u8 toggles = take8(in), num = take8(in), what = take8(in);

	g->pairs = what & 8 ? 2 : 1;
	g->features = 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_RING_F_EVENT_IDX |
		      1ull << VIRTIO_RING_F_INDIRECT_DESC | 1ull << VIRTIO_NET_F_MRG_RXBUF | host | guest;
	g->features ^=
		(toggles & 1 ? 1ull << VIRTIO_F_RING_PACKED : 0) | (toggles & 2 ? 1ull << VIRTIO_RING_F_EVENT_IDX : 0) |
		(toggles & 4 ? 1ull << VIRTIO_RING_F_INDIRECT_DESC : 0) |
		(toggles & 8 ? 1ull << VIRTIO_NET_F_MRG_RXBUF : 0) | (toggles & 16 ? 1ull << VIRTIO_F_IN_ORDER : 0) |
		(toggles & 32 ? 1ull << VIRTIO_F_VERSION_1 : 0) | (toggles & 64 ? host : 0) |
		(toggles & 128 ? guest : 0);
	g->port = xn_port_add_guest(bridge, g->pairs);
	MUST(g->port >= 0);
	/* Less than there is outside: an input is short. */
	for (u32 i = 0; i < 2 * g->pairs; i++)
		core_ring(g, &g->rings[i])->backlog.room = 128 * 1024;
	g->checked = what & 32;
	if (what & 16)
		(void)xn_port_set_macs(bridge, (u32)g->port, macs[index], 1, g->checked);
	else
		g->checked = false;
	if (what & 64) {
		const struct xn_ip ips[] = {{4, {10, 0, 0, 1}}, {6, {0xfd, 1}}};

		(void)xn_guest_set_ips(bridge, (u32)g->port, ips, 2);
	}
	lay_out(g, what & 7);
	g->table = TABLES;
	g->buffer = BUFFERS;
	set_memory(g);
	(void)xn_guest_set_features(bridge, (u32)g->port, g->features);
	for (u32 i = 0; i < 2 * g->pairs; i++) {
		u8 choice = i % 2 ? num >> 4 : num & 15;

		g->rings[i].offset = i * RING_ROOM;
		g->rings[i].num = toggles & 1 ? odd_sizes[choice] : sizes[choice];
		start_ring(g, &g->rings[i], what & 128 ? take16(in) : 0);
	}
	for (u32 i = 0; i < g->pairs; i++) {
		struct input ordinary = {0};

		if (what & 128)
			post_groups(in, g, &g->rings[2 * i], 1 + (take8(in) & 7));
		else
			for (u32 n = 0; n < 64; n++)
				post_buffers(&ordinary, g, &g->rings[2 * i]);
	}
}

static void remove_guest(u32 index)
{
	(void)xn_port_remove(bridge, (u32)guests[index].port);
	guests[index].port = -1;
}

/* ---- what must hold ---- */

/* What is looked at here tells nothing of what an input does. */
#define UNSEEN __attribute__((no_sanitize("coverage")))

/* What waits lies one behind the other, as far as there is room, and is looked after for as long as the ring takes frames. */
static UNSEEN void check_backlog(const struct virtqueue *q)
{
	const struct backlog *b = &q->backlog;
	u32 at = b->end - b->used, bytes = 0;

	MUST(b->n <= BACKLOG_FRAMES && b->used <= b->room && b->room * guest_of(q->port)->pairs <= BACKLOG_BYTES);
	MUST(!b->n || (q->started && q->enabled && q->index % 2 == XN_RX && q->source.worker));
	for (u32 i = 0; i < b->n; i++) {
		const struct waiting *f = &b->frames[(b->head + i) % BACKLOG_FRAMES];

		MUST(f->at == at + bytes && f->len >= ETH_HLEN && f->len <= XN_MAX_FRAME);
		bytes += f->len;
	}
	MUST(bytes == b->used);
}

static UNSEEN void check_ring(const struct virtqueue *q)
{
	check_backlog(q);
	if (!q->started)
		return;
	if (q->is_packed)
		MUST(q->next.pos < q->num && q->used.pos < q->num && q->next.wrap < 2 && q->used.wrap < 2);
	else
		MUST((u16)(q->avail_idx - q->next.pos) <= q->num && !(q->num & (q->num - 1)));
	if (q->loans)
		MUST(q->loans_tail - q->loans_head <= q->loans_mask + 1 &&
		     (q->is_packed || q->loans_tail - q->loans_head <= q->num));
	/* A frame of the wire is no longer than 64 KiB, nor cut into more than a guest may ask for. */
	MUST(q->stats.segments <= (GSO_MAX_SEGMENTS - 1) * q->stats.cut);
	MUST(q->stats.bytes <= q->stats.packets * XN_MAX_FRAME);
	MUST(q->index % 2 == XN_TX || q->stats.bytes >= q->stats.packets * ETH_HLEN);
}

static UNSEEN void check_netdev(const struct xsk *x)
{
	if (!x)
		return;
	u32 lent = 0;

	MUST(x->free_n <= x->arena->frames / 2);
	MUST(x->free_n + kernel_outstanding(x->fd) == x->arena->frames / 2);
	for (u32 i = 0; x->lent && i < x->arena->frames / 2; i++)
		if (x->lent[i]) {
			MUST(x->lent[i]->borrower == x);
			lent++;
		}
	MUST(lent == x->lent_n);
}

static UNSEEN void check_all(void)
{
	for (u32 i = 0; i < bridge->ports_n; i++) {
		const struct guest *g = guest_at(bridge, i);
		const struct netdev *d = netdev_at(bridge, i);

		for (u32 k = 0; g && k < 2 * g->pairs; k++)
			check_ring(&g->rings[k]);
		if (d)
			check_netdev(d->queue[0].xsk);
	}
	for (u32 i = 0; i < bridge->workers.n; i++) {
		const struct worker *w = bridge->workers.each[i];

		MUST(w->lenders_n <= w->sources_n && w->active_n <= w->sources_n);
		for (u32 a = 0; a < w->lenders_n; a++)
			for (u32 c = 0; c < a; c++)
				MUST(w->lenders[a] != w->lenders[c]);
	}
}

/* A guest's own address is nobody else's; of one whose source address is checked, nothing else was learned. */
static UNSEEN void check_addresses(void)
{
	static struct xn_fdb_entry entries[256];
	int n = xn_fdb_dump(bridge, entries, ARRAY_LEN(entries), XN_MAX_STATIONS);

	for (u32 i = 0; i < bridge->ports_n; i++)
		if (bridge->ports[i] && bridge->ports[i]->macs_n)
			MUST(fdb_lookup(bridge->fdb, bridge->ports[i]->macs[0], 1, bridge->workers.each[0]->now) == i);
	for (int i = 0; i < n && i < (int)ARRAY_LEN(entries); i++)
		for (u32 k = 0; k < guests_n; k++)
			if (guests[k].port == (int)entries[i].port && guests[k].checked)
				MUST(entries[i].is_static || !memcmp(entries[i].mac, macs[k], 6));
}

static UNSEEN u64 frames_delivered(void)
{
	u64 sum = 0;
	struct xn_queue_stats stats;

	for (u32 i = 0; i < bridge->ports_n; i++)
		for (u32 k = 0; k < PAIRS; k++)
			if (!xn_queue_stats(bridge, i, k, guest_at(bridge, i) ? XN_RX : XN_TX, &stats))
				sum += stats.packets;
	return sum;
}

/* ---- the program ---- */

static void turn(u32 n)
{
	for (; n; n--, clock_advance(tick_us))
		for (u32 i = 0; i < bridge->workers.n; i++) {
			(void)worker_turn(bridge->workers.each[i]);
			check_all();
			worker_wait(bridge->workers.each[i], 0);
		}
}

/* Rings that broke are started anew, as a driver does that resets its device. */
static void revive(struct guest_of *g)
{
	u32 base;

	for (u32 i = 0; g->port >= 0 && i < 2 * g->pairs; i++) {
		const struct virtqueue *q = core_ring(g, &g->rings[i]);

		if (!q || !q->broken)
			continue;
		(void)xn_ring_stop(bridge, (u32)g->port, i, &base);
		start_ring(g, &g->rings[i], 0);
		if (i % 2 == XN_RX) {
			struct input ordinary = {0};

			for (u32 n = 0; n < 16; n++)
				post_buffers(&ordinary, g, &g->rings[i]);
		}
	}
}

static void add_race(struct input *in, struct guest_of *g, struct ring *r)
{
	struct virtqueue *q = core_ring(g, r);
	struct race *race = &races[races_n];
	u8 how = take8(in);
	u32 slot = 0;

	disturbed = true;
	if (!q || !q->started || races_n == ARRAY_LEN(races))
		return;
	*race = (struct race){.times = 1, .repeats = how >> 6};
	if (how & 1)
		race->after = take8(in);
	else if (r->is_packed)
		race->at = &q->packed.desc[slot = r->num - 1 - take8(in) % r->num].flags;
	else
		race->at = &q->split.desc[(take8(in) * 4u) % r->num];
	switch (how >> 1 & 3) {
	case 0: /* what was taken is available again, in the next lap */
		race->n = 2;
		if (r->is_packed) {
			u16 flags = packed_avail_flags(q->next.wrap ^ 1);

			memcpy(race->bytes, &flags, 2);
			race->to = g->memory + r->desc + 14;
			race->step = 16;
			/* All that was taken before the one at which it happens. */
			race->times = race->at ? slot : r->num / 2;
		} else {
			u16 index = (u16)(r->next.pos + take8(in));

			memcpy(race->bytes, &index, 2);
			race->to = g->memory + r->avail + 2;
		}
		break;
	case 1: /* a descriptor */
		race->n = 16;
		race->to = g->memory + r->desc + 16 * (take8(in) % r->num);
		memcpy(race->bytes, race->to, 16);
		spoil(g, &(struct wrong){(u8)(1 + take8(in) % 15), 0, take64(in)}, race->bytes, r->is_packed, r->num);
		break;
	case 2: /* an entry of a table */
		race->n = 16;
		race->to = g->memory + TABLES + 16 * (take16(in) % ((TABLES_END - TABLES) / 16));
		memcpy(race->bytes, race->to, 16);
		spoil(g, &(struct wrong){(u8)(1 + take8(in) % 15), 0, take64(in)}, race->bytes, r->is_packed, r->num);
		break;
	default: /* of a frame, or its header */
		race->n = 8;
		race->to = g->memory + BUFFERS + take8(in) + 64 * (take8(in) & 15);
		for (u32 i = 0; i < race->n; i++)
			race->bytes[i] = take8(in);
	}
	races_n++;
}

static void poke(struct input *in, struct guest_of *g, struct ring *r)
{
	u8 how = take8(in);
	u32 at = how & 1   ? r->desc + take16(in) % (16 * r->num)
		 : how & 2 ? r->avail + take16(in) % (2 * r->num + 4)
			   : TABLES + take32(in) % (MEMORY - TABLES - 64);

	disturbed = true;
	for (u32 n = 1 + (how >> 5); n; n--)
		g->memory[at++] = take8(in);
}

static void control(struct input *in, u32 index)
{
	struct guest_of *g = &guests[index];
	u8 what = take8(in), more = take8(in);
	u32 ring = (more & 3) % (2 * g->pairs), port = (u32)g->port, base;
	struct xn_ring_state state;

	disturbed = true;
	switch (what % 16) {
	case 0:
		(void)xn_ring_stop(bridge, port, ring, &base);
		if (more & 4)
			start_ring(g, &g->rings[ring], take16(in));
		break;
	case 1:
		(void)xn_ring_enable(bridge, port, ring, more >> 2 & 1);
		break;
	case 2:
		lay_out(g, more);
		set_memory(g);
		break;
	case 3:
		if (!xn_guest_remove_region(bridge, port, &g->regions[more % g->regions_n]) && more & 0x80 &&
		    !xn_guest_add_region(bridge, port, &g->regions[more % g->regions_n]))
			poison_ends(g);
		break;
	case 4:
		remove_guest(index);
		add_guest(in, index);
		break;
	case 5:
		(void)xn_guest_announce(bridge, port, macs[more % 5]);
		break;
	case 6:
		(void)xn_guest_set_features(bridge, port, g->features ^ 1ull << more % 64);
		break;
	case 7:
		if (!xn_port_set_macs(bridge, port, macs[index], 1, more & 1)) {
			g->checked = false;
			(void)xn_fdb_flush(bridge, port);
		}
		break;
	case 8:
		(void)xn_ring_state(bridge, port, ring, &state);
		(void)xn_fdb_flush(bridge, port);
		break;
	case 9:
		renew_netdevs(more);
		break;
	case 10:
		for (u32 i = 0; i < netdevs_n; i++)
			(void)xn_netdev_is_stale(bridge, (u32)netdevs[i], more & 3);
		(void)xn_bridge_events(bridge);
		break;
	case 11:
		(void)clock_advance(more * 20000ull);
		break;
	case 12: {
		/* A ring of whatever size and place. */
		struct xn_ring_config c = {.num = take16(in) % (2 * MOST_NUM),
					   .base = take32(in),
					   .kick_fd = more & 8 ? kick_fd : -1,
					   .call_fd = call_fd,
					   .err_fd = -1};
		u32 at = take32(in) % MEMORY;

		c.desc_addr = user_addr(g, at / (more & 16 ? 1 : 16) * (more & 16 ? 1 : 16));
		c.avail_addr = user_addr(g, take32(in) % MEMORY / 4 * 4);
		c.used_addr = user_addr(g, take32(in) % MEMORY / 4 * 4);
		(void)xn_ring_stop(bridge, port, ring, &base);
		g->rings[ring].started = false;
		(void)xn_ring_start(bridge, port, ring, &c);
		break;
	}
	case 13:
		(void)xn_ring_set_call(bridge, port, ring, more & 4 ? call_fd : -1);
		break;
	case 14: {
		struct xn_region other = {.guest_addr = take64(in),
					  .size = take32(in),
					  .user_addr = take64(in),
					  .offset = take32(in) % MEMORY,
					  .fd = g->fd};

		if (!xn_guest_add_region(bridge, port, &other))
			poison_ends(g);
		break;
	}
	default: {
		struct xn_xsk_stats stats;

		for (u32 i = 0; i < netdevs_n; i++)
			(void)xn_netdev_xsk_stats(bridge, (u32)netdevs[i], 0, &stats);
	}
	}
}

static void change_kernel(struct input *in)
{
	static const int errors[] = {0, 0, ENETDOWN, EAGAIN, ENOBUFS, 0, 0, ENXIO};
	u8 how = take8(in);

	kernel.holds = how & 1;
	kernel.budget = how & 2 ? 16 : UINT32_MAX;
	kernel.error = how & 0x80 ? errors[how >> 2 & 7] : 0;
	for (u32 i = 0; i < netdevs_n; i++)
		kernel_complete(xn_netdev_queue_fd(bridge, (u32)netdevs[i], 0), take8(in));
}

static void step(struct input *in)
{
	static const char ops[] = "ssssssssssssppppttwwwwkkrrrroocc";
	u8 op = take8(in), who = take8(in);
	u32 index = who % guests_n;
	struct guest_of *g = &guests[index];
	u32 pair = (who >> 4 & 1) % g->pairs;
	struct ring *rx = &g->rings[2 * pair], *tx = rx + 1;

	switch (ops[op & 31]) {
	case 's':
		send_frames(in, index, tx);
		break;
	case 'p':
		post_groups(in, g, rx, 1 + (op >> 5 & 3));
		break;
	case 't':
		turn(1 + (op >> 5));
		break;
	case 'w':
		if (netdevs_n)
			receive_frames(in, who % netdevs_n);
		else
			send_frames(in, index, tx);
		break;
	case 'k':
		change_kernel(in);
		break;
	case 'r':
		add_race(in, g, op & 0x80 ? rx : tx);
		return; /* with what is to come */
	case 'o':
		poke(in, g, op & 0x80 ? rx : tx);
		break;
	default:
		control(in, index);
	}
	if (!(who & 0x80)) {
		(void)eventfd_write(kick_fd, 1);
		turn(1);
		races_n = 0;
		for (u32 i = 0; g->port >= 0 && i < 2 * g->pairs; i++)
			take_used(g, &g->rings[i]);
		revive(g);
	}
}

static void make_world(struct input *in)
{
	static const u8 numbers[] = {2, 3, 4, 2};
	static const u32 ticks[] = {1, 20, 300, 5000};
	u8 world = take8(in), wires = take8(in), pace = take8(in);
	const struct xn_bridge_config config = {.workers = pace & 16 ? 2 : 1,
						.cpus = {-1, -1},
						.spin_us = pace & 8 ? 50 : 0,
						.ageing_s = 300,
						.netdev_queues = NETDEVS,
						.frames_per_queue = FRAMES,
						.max_macs = pace & 32 ? 2 : 64,
						.zerocopy = wires & 1 ? XN_ZEROCOPY_OFF : XN_ZEROCOPY_ON,
						.copybreak = wires & 2 ? 256 : 0};

	kernel_reset();
	kernel.zerocopy = wires & 4;
	kernel.metadata = !(wires & 8);
	kernel.holds = wires & 16;
#ifdef ORACLE
	oracle_rate = 1 + (world >> 4) * 2;
#endif
	bridge = xn_bridge_new(&config);
	MUST(bridge);
	tick_us = ticks[pace & 3];
	guests_n = numbers[world & 3];
	netdevs_n = world >> 2 & 3;
	if (netdevs_n > NETDEVS)
		netdevs_n = guests_n = 1;
	for (u32 i = 0; i < guests_n; i++)
		add_guest(in, i);
	for (u32 i = 0; i < netdevs_n; i++) {
		netdevs[i] = xn_port_add_netdev(bridge, 1);
		MUST(netdevs[i] >= 0);
		open_netdev(i, wires >> 5 | (world & 0x80 ? 8 : 0));
		(void)xn_netdev_set_group_fd(bridge, (u32)netdevs[i], kick_fd);
	}
}

/* Every program ends with an ordinary exchange. */
static void end_world(void)
{
	struct input ordinary = {0};

	racing = NULL;
	races_n = 0;
	kernel.error = 0;
	for (u32 i = 0; i < guests_n; i++)
		revive(&guests[i]);
	for (u32 i = 0; i < guests_n; i++)
		send_frames(&ordinary, i, &guests[i].rings[XN_TX]);
	turn(2);
	check_addresses();
	delivered = frames_delivered();
	for (u32 i = 0; i < netdevs_n; i++)
		kernel_complete(xn_netdev_queue_fd(bridge, (u32)netdevs[i], 0), UINT32_MAX);
	kernel.holds = false;
	turn(1);
	xn_bridge_free(bridge);
	bridge = NULL;
}

static void report(void)
{
	if (runs && getenv("FUZZ_REPORT"))
		fprintf(stderr, "frames were delivered in %llu of %llu runs\n", (unsigned long long)moving,
			(unsigned long long)runs);
}

/* SIGBUS is the core's own business. A short quarantine keeps what a run allocates in the cache. */
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
	return "handle_sigbus=0:allow_user_segv_handler=1:quarantine_size_mb=4";
}

const char *__ubsan_default_options(void);
const char *__ubsan_default_options(void)
{
	return "print_stacktrace=1";
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc, (void)argv;
	MUST(!xn_time_hold());
	kick_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	call_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	for (u32 i = 0; i < GUESTS; i++) {
		guests[i].fd = memfd_create("fuzz", MFD_CLOEXEC);
		MUST(guests[i].fd >= 0 && !ftruncate(guests[i].fd, MEMORY));
		guests[i].memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, guests[i].fd, 0);
		MUST(guests[i].memory != MAP_FAILED);
		/* Nothing is lent from memory with holes. */
		memset(guests[i].memory, 0, MEMORY);
	}
	atexit(report);
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, size};
	u64 before;

	races_n = 0;
	racing = NULL;
	chance = 0;
#ifdef ORACLE
	disturbed = true;
#else
	disturbed = false;
#endif
	make_world(&in);
	before = frames_delivered();
	racing = &in;
	for (u32 ops = 0; in.left && ops < MOST_OPS; ops++)
		step(&in);
	runs++;
	moving += frames_delivered() > before;
	end_world();
	return 0;
}
