/* Ones' complement sums, RFC 1071, over 16-bit words in memory order. */
#ifndef XN_CSUM_H
#define XN_CSUM_H

#include "view.h"

/* Unfolded sum of n bytes; an odd last one counts as a word with a zero behind it. */
u64 csum_bytes(const u8 *p, u32 n);
/* The same, of what is copied. */
u64 csum_copy(u8 *to, const u8 *from, u32 n);

static inline u16 csum_fold(u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (u16)sum;
}

/* Adds the sum of a stretch that begins `at` bytes behind where the words begin. */
static inline u64 csum_add(u64 sum, u64 part, u32 at)
{
	u16 folded = csum_fold(part);

	return sum + (at & 1 ? __builtin_bswap16(folded) : folded);
}

/* Zero stands for "no checksum" in UDP, and is the same number as this one. */
static inline u16 csum_mangle(u16 sum)
{
	return sum ? sum : 0xffff;
}

/* Copies a frame that needs its checksum, and completes it there. `to` has room for v->len bytes. */
void csum_copy_view(u8 *to, const struct view *v);
/* The same, into several of TX_PIECE bytes; all headers go into the first. */
void csum_copy_large(u8 *const *to, const struct view *v);
/* Completes it where the frame lies; its first piece is memory of ours that holds the field. */
void csum_complete(struct view *v);
/* Makes the sum of [start, end), for a field in its first piece, which is memory of ours. */
void csum_complete_part(const struct view *v, u32 start, u32 field, u32 end);
/* Whether TCP's or UDP's checksum is there and right. */
bool csum_is_right(const struct view *v, u32 l4, u32 end, u64 pseudo);
/* Of the addresses, protocol and length that TCP and UDP take into their sums; ip: the IP header. */
u64 csum_pseudo(const u8 *ip, u8 version, u8 protocol, u32 l4_len);

#endif
