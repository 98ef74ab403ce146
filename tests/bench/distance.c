/* How long a cache line takes from one CPU to another and back, in nanoseconds: distance CPU CPU. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { TRIPS = 200000 };

static uint32_t line __attribute__((aligned(128)));

static void pin(int cpu)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	pthread_setaffinity_np(pthread_self(), sizeof(cpus), &cpus);
}

static void await(uint32_t value)
{
	while (__atomic_load_n(&line, __ATOMIC_ACQUIRE) != value)
		;
}

static void *answer(void *cpu)
{
	pin(atoi(cpu));
	for (uint32_t i = 0; i < TRIPS; i++) {
		await(2 * i + 1);
		__atomic_store_n(&line, 2 * i + 2, __ATOMIC_RELEASE);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	struct timespec start, end;
	pthread_t other;

	if (argc != 3 || pthread_create(&other, NULL, answer, argv[2]))
		return 2;
	pin(atoi(argv[1]));
	clock_gettime(CLOCK_MONOTONIC, &start);
	for (uint32_t i = 0; i < TRIPS; i++) {
		__atomic_store_n(&line, 2 * i + 1, __ATOMIC_RELEASE);
		await(2 * i + 2);
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%.0f\n", ((double)(end.tv_sec - start.tv_sec) * 1e9 + (double)(end.tv_nsec - start.tv_nsec)) / TRIPS);
	return 0;
}
