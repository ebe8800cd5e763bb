package task_test

import (
	"context"
	"os/signal"

	"golang.org/x/sys/unix"
)

func signalled() (context.Context, func()) {
	return signal.NotifyContext(context.Background(), unix.SIGTERM)
}
