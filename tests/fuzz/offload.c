/*
 * Sums, cuts and joins against references that know nothing of how the core makes them: a sum byte by byte, a cut whose
 * segments are right one by one and carry the payload in order, a join that can be cut into the very same frames.
 */
#include <linux/if_ether.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>

#include "frame/csum.h"
#include "frame/gro.h"
#include "frame/gso.h"
#include "frame/partial.h"
#include "frame/vnet.h"
#include "packets.h"

enum { ALONE = 100, FRAMES = 40, JOIN_ROOM = 10 * 1024, MOST_CUT = 72 * 1024, MOST_PIECES = 1024 };

static const u8 macs[3][6] = {{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}, {2, 0, 0, 0, 0, 3}};
static const struct stations stations = {macs, 3, 0};

_Noreturn void fuzz_found(const char *what, const char *file, int line)
{
	fprintf(stderr, "FOUND: %s does not hold, %s:%d\n", what, file, line);
	abort();
}

void oracle_loaded(const void *guest, void *loaded, size_t n)
{
	(void)guest, (void)loaded, (void)n;
}

/* ---- references ---- */

static u32 add_words(u32 sum, const u8 *p, u32 n)
{
	for (u32 i = 0; i < n; i++) {
		sum += i % 2 ? p[i] : (u32)p[i] << 8;
		if (sum > 0xffff)
			sum -= 0xffff;
	}
	return sum;
}

/* Where IP is, and what is behind it; false: it is no packet that this reference knows. */
struct layers {
	u32 ip, l4, end, payload;
	u8 version, protocol;
};

static bool find_layers(const u8 *p, u32 len, struct layers *at)
{
	u32 type = 12;

	while (type + 6 < len && (load_be16(p + type) == ETH_P_8021Q || load_be16(p + type) == ETH_P_8021AD))
		type += 4;
	*at = (struct layers){.ip = type + 2};
	if (type + 2 + IPV4_HDR > len || (load_be16(p + type) == ETH_P_IPV6 && type + 2 + IPV6_HDR > len))
		return false;
	const u8 *ip = p + at->ip;

	if (load_be16(p + type) == ETH_P_IP && ip[0] >> 4 == 4) {
		at->version = 4;
		at->l4 = at->ip + (ip[0] & 15) * 4u;
		at->end = at->ip + load_be16(ip + 2);
		at->protocol = ip[9];
	} else if (load_be16(p + type) == ETH_P_IPV6 && ip[0] >> 4 == 6) {
		at->version = 6;
		at->l4 = at->ip + 40;
		at->end = at->l4 + load_be16(ip + 4);
		at->protocol = ip[6];
		while (at->l4 + 8 < len && (at->protocol == IPPROTO_HOPOPTS || at->protocol == IPPROTO_ROUTING ||
					    at->protocol == IPPROTO_DSTOPTS)) {
			at->protocol = p[at->l4];
			at->l4 += 8 + p[at->l4 + 1] * 8u;
		}
	} else {
		return false;
	}
	if (at->end > len || at->l4 + 8 > at->end)
		return false;
	if (at->protocol == IPPROTO_TCP && at->l4 + 20 <= at->end)
		at->payload = at->l4 + (p[at->l4 + 12] >> 4) * 4u;
	else if (at->protocol == IPPROTO_UDP)
		at->payload = at->l4 + 8;
	else
		return false;
	return at->payload <= at->end;
}

static u32 pseudo_sum(const u8 *p, const struct layers *at)
{
	const u8 *addresses = p + at->ip + (at->version == 4 ? 12 : 8);
	const u8 tail[4] = {0, at->protocol, (u8)((at->end - at->l4) >> 8), (u8)(at->end - at->l4)};

	return add_words(add_words(0, addresses, at->version == 4 ? 8 : 32), tail, sizeof(tail));
}

static bool sums_are_right(const u8 *p, const struct layers *at)
{
	if (at->version == 4 && add_words(0, p + at->ip, at->l4 - at->ip) % 0xffff)
		return false;
	return !(add_words(pseudo_sum(p, at), p + at->l4, at->end - at->l4) % 0xffff);
}

static bool is_partial(const u8 *p, const struct layers *at)
{
	return load_be16(p + at->l4 + (at->protocol == IPPROTO_TCP ? TCP_CSUM : UDP_CSUM)) % 0xffff ==
	       pseudo_sum(p, at) % 0xffff;
}

/* The frame as the wire has it: its checksum made, if it needs one. */
static void flatten(u8 *to, const struct view *v)
{
	if (v->needs & NEED_CSUM)
		csum_copy_view(to, v);
	else
		view_copy(to, v);
}

/* ---- one frame ---- */

static u32 cut_up(struct input *in, u8 *from, u32 len, struct piece *out, u32 most)
{
	u32 n = 0;

	while (len) {
		u32 part = n + 1 == most ? len : min_u32(len, 1 + take8(in) * 16u);

		out[n++] = (struct piece){from, part};
		from += part;
		len -= part;
	}
	return n;
}

static void check_sums(const struct view *v, const u8 *frame)
{
	static u8 whole[MOST_CUT], parts[WIRE_PIECES + 4][TX_PIECE], place[PACKET_HEADERS];
	static struct piece pieces[MOST_PIECES];
	const u32 start = v->vnet.csum_start, field = start + v->vnet.csum_offset;
	u8 *large[WIRE_PIECES + 4];
	u32 sum = (~add_words(0, frame + start, v->len - start)) & 0xffff;
	struct view copy = *v;

	if (!sum)
		sum = 0xffff;
	csum_copy_view(whole, v);
	/* Zero and 0xffff are one number. */
	MUST(load_be16(whole + field) % 0xffff == sum % 0xffff && load_be16(whole + field));
	MUST(!memcmp(whole, frame, field) && !memcmp(whole + field + 2, frame + field + 2, v->len - field - 2));
	for (u32 i = 0; i < ARRAY_LEN(large); i++)
		large[i] = parts[i];
	if (v->len > VIEW_HEAD && v->len <= XN_MAX_FRAME) {
		csum_copy_large(large, v);
		for (u32 i = 0; i < v->len; i++)
			MUST(parts[i / TX_PIECE][i % TX_PIECE] == whole[i]);
	}
	/* Where it lies, in headers of its own. */
	memcpy(pieces, v->pieces, v->n * sizeof(*pieces));
	memcpy(place, v->pieces->ptr, v->pieces->len);
	pieces->ptr = place;
	copy.pieces = pieces;
	csum_complete(&copy);
	view_copy(whole, &copy);
	MUST(load_be16(whole + field) % 0xffff == sum % 0xffff);
}

static void check_cut(const struct view *v, const u8 *frame)
{
	static struct gso_room room;
	static u8 segment[MOST_CUT], datagram[MOST_CUT];
	const bool fragments = v->needs & NEED_UFO;
	struct layers at, of;
	struct view whole = *v;
	struct gso cut;
	u32 n, done = 0, segments = 0, size = v->vnet.gso_size;

	MUST(find_layers(frame, v->len, &at));
	bool partial = is_partial(frame, &at);
	const u32 headers = fragments ? at.l4 : at.payload;

	memcpy(datagram, frame, v->len);
	if (fragments)
		csum_copy_view(datagram, v);
	gso_start(&cut, &whole);
	while ((n = gso_next(&cut, &room)))
		for (u32 i = 0; i < n; i++, segments++) {
			const struct view *s = &room.views[i];

			MUST(s->len <= sizeof(segment));
			flatten(segment, s);
			if (fragments) {
				u32 extra = at.version == 6 ? 8 : 0, part = s->len - headers - extra;

				MUST(part <= size &&
				     !memcmp(segment + headers + extra, datagram + headers + done, part));
				MUST(load_be16(segment + at.ip + (at.version == 4 ? 2 : 4)) ==
				     s->len - at.ip - (at.version == 4 ? 0 : 40));
				done += part;
				continue;
			}
			MUST(find_layers(segment, s->len, &of) && of.end == s->len && of.payload == headers);
			u32 part = s->len - headers;

			MUST(part && part <= size && !memcmp(segment + headers, frame + headers + done, part));
			if (at.protocol == IPPROTO_TCP)
				MUST(load_be32(segment + of.l4 + 4) == load_be32(frame + at.l4 + 4) + done);
			MUST(!partial || sums_are_right(segment, &of));
			done += part;
		}
	MUST(done == v->len - headers && segments > 1 && segments <= GSO_MAX_SEGMENTS);
	/* And it is as it was. */
	MUST(whole.needs == v->needs && !memcmp(&whole.vnet, &v->vnet, sizeof(v->vnet)));
	MUST(!memcmp(whole.pieces->ptr, frame, whole.pieces->len));
}

static void check_frame(struct input *in)
{
	static u8 frame[PACKET_ROOM], headers[PACKET_HEADERS];
	static struct piece pieces[MOST_PIECES];
	struct virtio_net_hdr hdr;
	u32 len = packet_make(in, &stations, frame, &hdr), have = min_u32(len, PACKET_HEADERS);
	struct view v = {.pieces = pieces, .len = len};

	if (len < ETH_HLEN || len > XN_MAX_FRAME || (!hdr.gso_type && !(hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM)))
		return;
	memcpy(headers, frame, have);
	pieces[0] = (struct piece){headers, have};
	v.n = 1 + cut_up(in, frame + have, len - have, pieces + 1, MOST_PIECES - 1);
	view_snapshot(&v);
	vnet_judge(&v, &hdr, 0xff, headers, have);
	if (v.port == VIEW_DROPPED)
		return;
	MUST(v.needs & NEED_CSUM);
	if (v.needs & NEED_CUT)
		check_cut(&v, frame);
	else
		check_sums(&v, frame);
}

/* ---- frames that may be partial ---- */

/* Nothing but checksums is touched, and what is complete then stays as it is. */
static void check_found(struct input *in)
{
	static u8 frames[2][PACKET_ROOM], made[2][PACKET_ROOM];
	struct virtio_net_hdr hdr;
	u32 len = packet_make(in, &stations, frames[0], &hdr), changed = 0;

	if (len < ETH_HLEN || len > XN_MAX_FRAME)
		return;
	memcpy(made[1], frames[0], len);
	for (u32 turn = 0; turn < 2; turn++) {
		struct piece pieces[2];
		struct view v = {.pieces = pieces, .n = 1, .len = len};
		const u32 first = min_u32(len, XN_FRAME_SIZE);
		/* Of its own size: a byte too far is seen. */
		u8 *place = malloc(first);

		MUST(place);
		memcpy(place, frames[turn], first);
		pieces[0] = (struct piece){place, first};
		if (len > XN_FRAME_SIZE)
			pieces[v.n++] = (struct piece){frames[turn] + XN_FRAME_SIZE, len - XN_FRAME_SIZE};
		partial_find(&v);
		view_snapshot(&v);
		flatten(made[0], &v);
		free(place);
		MUST(v.len <= len);
		len = v.len;
		if (!turn) {
			for (u32 i = 0; i < len; i++)
				changed += made[0][i] != made[1][i];
			MUST(changed <= 2 * 4);
			memcpy(frames[1], made[0], len);
		} else {
			MUST(!memcmp(made[0], frames[1], len));
		}
	}
}

/* ---- frames that are joined ---- */

static void finish_sums(u8 *p, u32 len, bool partial)
{
	struct layers at;
	u32 sum;

	if (!find_layers(p, len, &at))
		return;
	u8 *field = p + at.l4 + (at.protocol == IPPROTO_TCP ? TCP_CSUM : UDP_CSUM);

	if (at.version == 4) {
		store_be16(p + at.ip + 10, 0);
		store_be16(p + at.ip + 10, ~add_words(0, p + at.ip, at.l4 - at.ip));
	}
	store_be16(field, 0);
	sum = partial ? pseudo_sum(p, &at) : ~add_words(pseudo_sum(p, &at), p + at.l4, at.end - at.l4) & 0xffff;
	store_be16(field, sum ? sum : 0xffff);
}

/* A flow's next frame: what a sender would send, but for what the input wants otherwise. */
static u32 next_frame(struct input *in, u8 *p, const u8 *last, u32 len, u32 *flow)
{
	struct layers at;
	u8 how = take8(in);

	memcpy(p, last, len);
	if (!find_layers(p, len, &at))
		return len;
	u32 part = at.end - at.payload;

	if (at.version == 4 && !(how & 0x40))
		store_be16(p + at.ip + 4, load_be16(p + at.ip + 4) + 1u);
	if (at.protocol == IPPROTO_TCP) {
		store_be32(p + at.l4 + 4, load_be32(p + at.l4 + 4) + part);
		if ((how & 15) == 14)
			p[at.l4 + TCP_FLAGS] |= 8;
		if ((how & 15) == 13)
			p[at.l4 + 15] ^= 1;
	}
	store_be16(p + at.l4, 1000 + *flow);
	/* A shorter one. */
	if ((how & 15) == 12 && part > 1) {
		u32 less = 1 + take8(in) % part;

		if (less == part)
			less = part - 1;
		len -= less;
		if (at.version == 4)
			store_be16(p + at.ip + 2, load_be16(p + at.ip + 2) - less);
		else
			store_be16(p + at.ip + 4, load_be16(p + at.ip + 4) - less);
		if (at.protocol == IPPROTO_UDP)
			store_be16(p + at.l4 + 4, load_be16(p + at.l4 + 4) - less);
	}
	finish_sums(p, len, how & 0x20);
	/* A byte that is wrong may make it another flow's. */
	if ((how & 15) == 15) {
		p[take8(in) % len] = take8(in);
		*flow = ALONE;
	}
	return len;
}

static bool same_frame(const u8 *a, const u8 *b, u32 len)
{
	struct layers at;

	if (!memcmp(a, b, len))
		return true;
	if (!find_layers(a, len, &at) || at.version != 4)
		return false;
	/* Of the two zeroes of a sum, the other one. And who may not be fragmented has no identification (RFC 6864). */
	const u32 same = a[at.ip + 6] & 0x40 ? 4 : 10;

	return !memcmp(a, b, at.ip + same) && !memcmp(a + at.ip + 6, b + at.ip + 6, 4) &&
	       !memcmp(a + at.ip + 12, b + at.ip + 12, len - at.ip - 12) &&
	       !(add_words(0, a + at.ip, at.l4 - at.ip) % 0xffff) == !(add_words(0, b + at.ip, at.l4 - at.ip) % 0xffff);
}

static void check_join(struct input *in)
{
	static u8 frames[FRAMES][JOIN_ROOM], expected[FRAMES][JOIN_ROOM], made[JOIN_ROOM], first[PACKET_ROOM];
	static struct gro_room room;
	static struct gso_room cuts;
	static struct view views[FRAMES];
	static struct piece pieces[FRAMES];
	u32 len, n = 2 + take8(in) % (FRAMES - 2), lengths[FRAMES], flows[FRAMES], last[4], out = 0;
	bool begun[4] = {0};
	struct virtio_net_hdr hdr;
	struct gro_done done = {0};
	u8 which[XN_BURST];

	len = packet_make(in, &stations, first, &hdr);
	if (len < 60 || len > JOIN_ROOM - 300)
		return;
	for (u32 i = 0; i < n; i++) {
		u32 flow = flows[i] = take8(in) % 7 == 6 ? take8(in) & 3 : 0;
		const bool goes_on = begun[flow];

		lengths[i] = next_frame(in, frames[i], goes_on ? frames[last[flow]] : first,
					goes_on ? lengths[last[flow]] : len, &flows[i]);
		if (flows[i] != ALONE) {
			begun[flow] = true;
			last[flow] = i;
		}
		pieces[i] = (struct piece){frames[i], lengths[i]};
		views[i] = (struct view){.pieces = &pieces[i], .n = 1, .len = lengths[i]};
		partial_find(&views[i]);
		view_snapshot(&views[i]);
		flatten(expected[i], &views[i]);
		lengths[i] = views[i].len;
		which[i] = (u8)i;
	}
	u32 left = gro_join(&room, views, which, n, 0xff, &done);
	bool met[FRAMES] = {0};

	MUST(left + done.joined == n);
	for (u32 i = 0; i < left; i++) {
		struct view *v = &views[which[i]];
		struct gso cut = {0};
		u32 segments = 1;
		const bool joined = v->needs & NEED_CUT;

		if (joined)
			gso_start(&cut, v);
		while (!joined ? segments : (segments = gso_next(&cut, &cuts))) {
			for (u32 k = 0; k < segments; k++) {
				const struct view *s = joined ? &cuts.views[k] : v;
				u32 found = 0;

				MUST(s->len <= sizeof(made));
				flatten(made, s);
				/* The first of those that are still expected, and the flow's own are so in order. */
				while (found < n && (met[found] || lengths[found] != s->len ||
						     !same_frame(expected[found], made, s->len)))
					found++;
				MUST(found < n);
				for (u32 before = 0; before < found; before++)
					MUST(met[before] || flows[before] == ALONE || flows[before] != flows[found]);
				met[found] = true;
				out++;
			}
			if (!joined)
				break;
		}
	}
	MUST(out == n);
}

const char *__ubsan_default_options(void);
const char *__ubsan_default_options(void)
{
	return "print_stacktrace=1";
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {data, size};

	for (u32 n = 0; in.left && n < 4; n++) {
		u8 what = take8(&in);

		if (what & 1)
			check_join(&in);
		else if ((what & 6) == 6)
			check_found(&in);
		else
			check_frame(&in);
	}
	return 0;
}
