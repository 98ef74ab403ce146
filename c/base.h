/*
 * What every part of the core shares: fixed-width types, the memory-order helpers and the counters.
 *
 * A counter is written by one thread at a time (the owner of its queue, or the holder of the queue's lock) and read by
 * the control thread at any moment: a relaxed store keeps it whole, without a locked instruction.
 */
#ifndef XN_BASE_H
#define XN_BASE_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "xdpnet.h"

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int32_t s32;
typedef int64_t s64;

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define XN_CACHELINE 64
#define XN_ALIGNED __attribute__((aligned(XN_CACHELINE)))
#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))
#define container_of(ptr, type, member) ((type *)((char *)(ptr)-offsetof(type, member)))

/* Bytes between arrays of one struct, that nobody may touch: with AddressSanitizer, which is told so. */
#if defined(__SANITIZE_ADDRESS__) /* gcc */
#define XN_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) /* clang */
#define XN_ASAN 1
#endif
#endif
#ifdef XN_ASAN
#include <sanitizer/asan_interface.h>
enum { XN_GAP = 64 };
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
enum { XN_GAP = 0 };
#endif

/* Frames or chains that one turn takes from one source: enough to amortise the fences, few enough to stay in L1. */
enum { XN_BURST = 64 };

static inline u32 min_u32(u32 a, u32 b)
{
	return a < b ? a : b;
}

static inline void count(uint64_t *counter, u64 n)
{
	__atomic_store_n(counter, *counter + n, __ATOMIC_RELAXED);
}

static inline u64 counted(const uint64_t *counter)
{
	return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

/* n frames are lost, for this reason. */
static inline void drop(struct xn_queue_stats *stats, enum xn_drop why, u64 n)
{
	count(&stats->drops[why], n);
}

/* The same where there is no ring or socket, and so no owner: several workers may count here. */
static inline void drop_ownerless(struct xn_queue_stats *stats, enum xn_drop why, u64 n)
{
	__atomic_fetch_add(&stats->drops[why], n, __ATOMIC_RELAXED);
}

/* As struct xn_worker_stats has it. */
static inline u32 place_of(u32 port, u32 queue)
{
	return port << 8 | queue;
}

static inline u32 port_of(u32 place)
{
	return place >> 8;
}

static inline void full_fence(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static inline void prefetch(const void *p)
{
	__builtin_prefetch(p, 0, 3);
}

/* Takes the line away from the other core at once: a store to a line that is only shared waits for that. */
static inline void prefetch_write(const void *p)
{
#if defined(__x86_64__) || defined(__i386__)
	/* For the compiler's builtin this needs -mprfchw; processors that lack it take it for a no-op. */
	__asm__ volatile("prefetchw %0" ::"m"(*(const char *)p));
#else
	__builtin_prefetch(p, 1, 3);
#endif
}

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#else
	__asm__ volatile("yield" ::: "memory");
#endif
}

struct spinlock {
	u32 held;
};

static inline void spin_lock(struct spinlock *l)
{
	while (__atomic_exchange_n(&l->held, 1, __ATOMIC_ACQUIRE))
		while (__atomic_load_n(&l->held, __ATOMIC_RELAXED))
			relax();
}

static inline void spin_unlock(struct spinlock *l)
{
	__atomic_store_n(&l->held, 0, __ATOMIC_RELEASE);
}

#endif
