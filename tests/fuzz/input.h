/*
 * What libFuzzer gives a target, read as a program. Each choice takes a byte, and the choice for zero is the ordinary one:
 * whatever the bytes are, rings are valid and frames move, and what an input is short of is ordinary.
 */
#ifndef FUZZ_INPUT_H
#define FUZZ_INPUT_H

#include "base.h"

struct input {
	const u8 *at;
	size_t left;
};

static inline u8 take8(struct input *in)
{
	if (!in->left)
		return 0;
	in->left--;
	return *in->at++;
}

static inline u16 take16(struct input *in)
{
	u16 low = take8(in);

	return (u16)(low | take8(in) << 8);
}

static inline u32 take32(struct input *in)
{
	u32 low = take16(in);

	return low | (u32)take16(in) << 16;
}

static inline u64 take64(struct input *in)
{
	u64 low = take32(in);

	return low | (u64)take32(in) << 32;
}

/* What must hold whatever a guest does: a finding, with its place. */
#define MUST(condition) ((condition) ? (void)0 : fuzz_found(#condition, __FILE__, __LINE__))
_Noreturn void fuzz_found(const char *what, const char *file, int line);

#endif
