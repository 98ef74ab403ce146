#include "csum.h"

/* ---- sums ---- */

typedef u64 lanes __attribute__((vector_size(32)));

/* Each lane is two 32-bit words, summed apart: 2^32 of them fit. */
static inline void add_lanes(lanes *low, lanes *high, const lanes *v)
{
	*low += *v & 0xffffffff;
	*high += *v >> 32;
}

static inline u64 sum_lanes(const lanes *low, const lanes *high)
{
	const lanes all = *low + *high;

	return all[0] + all[1] + all[2] + all[3];
}

static u64 sum_tail(const u8 *p, u32 n)
{
	u64 sum = 0;

	for (; n >= 2; n -= 2, p += 2) {
		u16 word;

		memcpy(&word, p, sizeof(word));
		sum += word;
	}
	if (n) {
		const u8 last[2] = {*p, 0};
		u16 word;

		memcpy(&word, last, sizeof(word));
		sum += word;
	}
	return sum;
}

u64 csum_bytes(const u8 *p, u32 n)
{
	lanes low = {0}, high = {0}, v;

	for (; n >= sizeof(v); n -= sizeof(v), p += sizeof(v)) {
		memcpy(&v, p, sizeof(v));
		add_lanes(&low, &high, &v);
	}
	return sum_lanes(&low, &high) + sum_tail(p, n);
}

u64 csum_copy(u8 *to, const u8 *from, u32 n)
{
	lanes low = {0}, high = {0}, v;

	/* A block goes through registers: what is summed is what is stored, whatever becomes of `from`. */
	for (; n >= sizeof(v); n -= sizeof(v), from += sizeof(v), to += sizeof(v)) {
		g_copy_from(&v, from, sizeof(v));
		memcpy(to, &v, sizeof(v));
		add_lanes(&low, &high, &v);
	}
	g_copy_from(to, from, n);
	return sum_lanes(&low, &high) + sum_tail(to, n);
}

u64 csum_pseudo(const u8 *ip, u8 version, u8 protocol, u32 l4_len)
{
	const u8 tail[8] = {(u8)(l4_len >> 24), (u8)(l4_len >> 16), (u8)(l4_len >> 8), (u8)l4_len, 0, 0, 0, protocol};
	u64 addresses = version == 4 ? csum_bytes(ip + 12, 8) : csum_bytes(ip + 8, 32);

	return addresses + csum_bytes(tail, sizeof(tail));
}

/* ---- frames ---- */

/* Copies the bytes [at, at + n) of a frame whose checksum begins at `start`; what they add to it. */
static inline u64 copy_stretch(u64 sum, u8 *to, const u8 *from, u32 n, u32 at, u32 start)
{
	u32 before = at < start ? min_u32(start - at, n) : 0;

	g_copy_from(to, from, before);
	return csum_add(sum, csum_copy(to + before, from + before, n - before), at + before - start);
}

static inline void put_sum(u8 *to, const struct view *v, u64 sum)
{
	u16 done = csum_mangle((u16)~csum_fold(sum));

	memcpy(to + v->vnet.csum_start + v->vnet.csum_offset, &done, sizeof(done));
}

void csum_copy_view(u8 *to, const struct view *v)
{
	u64 sum = 0;
	u32 at = 0;

	for (u32 i = 0; i < v->n && at < v->len; i++) {
		u32 n = min_u32(v->pieces[i].len, v->len - at);

		sum = copy_stretch(sum, to + at, v->pieces[i].ptr, n, at, v->vnet.csum_start);
		at += n;
	}
	put_sum(to, v, sum);
}

void csum_copy_large(u8 *const *to, const struct view *v)
{
	u64 sum = 0;
	u32 at = 0;

	for (u32 i = 0; i < v->n && at < v->len; i++) {
		const u8 *from = v->pieces[i].ptr;

		for (u32 left = min_u32(v->pieces[i].len, v->len - at), n; left; left -= n, from += n, at += n) {
			n = min_u32(left, TX_PIECE - at % TX_PIECE);
			sum = copy_stretch(sum, to[at / TX_PIECE] + at % TX_PIECE, from, n, at, v->vnet.csum_start);
		}
	}
	put_sum(*to, v, sum);
}

void csum_complete_part(const struct view *v, u32 start, u32 field, u32 end)
{
	u64 sum = 0;
	u32 at = 0;

	for (u32 i = 0; i < v->n && at < end; i++) {
		u32 n = min_u32(v->pieces[i].len, end - at), before = at < start ? min_u32(start - at, n) : 0;

		at += before;
		sum = csum_add(sum, csum_bytes(v->pieces[i].ptr + before, n - before), at - start);
		at += n - before;
	}
	u16 done = csum_mangle((u16)~csum_fold(sum));

	memcpy(v->pieces->ptr + field, &done, sizeof(done));
}

void csum_complete(struct view *v)
{
	const u32 start = v->vnet.csum_start, field = start + v->vnet.csum_offset;

	csum_complete_part(v, start, field, v->len);
	if (field < VIEW_HEAD)
		memcpy(v->head, v->pieces->ptr, min_u32(VIEW_HEAD, v->pieces->len));
	v->vnet.flags = 0;
	v->vnet.csum_start = v->vnet.csum_offset = 0;
	v->needs &= (u8)~NEED_CSUM;
}

bool csum_is_right(const struct view *v, u32 l4, u32 end, u64 pseudo)
{
	u64 sum = pseudo;
	u32 at = 0;

	for (u32 i = 0; i < v->n && at < end; i++) {
		u32 n = min_u32(v->pieces[i].len, end - at), before = at < l4 ? min_u32(l4 - at, n) : 0;

		at += before;
		sum = csum_add(sum, csum_bytes(v->pieces[i].ptr + before, n - before), at - l4);
		at += n - before;
	}
	return csum_fold(sum) == 0xffff;
}
