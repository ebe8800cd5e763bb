// Instar-init is the init of Instar's initrd: the smaller sister of instar, for
// it fetches with net/http alone. As process 1 it boots the machine and, as
// "@instar-root", is the server of a root that comes lazily; as
// "instar-init user-data" it runs an instance's user data in the booted system.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/instar-image/instar/initrd/boot"
	"github.com/instar-image/instar/initrd/lazyroot/resident"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	var err error
	switch {
	case resident.Called():
		// Nobody ends what the root lies on.
		signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
		err = boot.ServeRoot(context.Background())
	case len(os.Args) == 2 && os.Args[1] == "user-data":
		err = boot.RunUserData(ctx, os.Stdout)
	default:
		err = boot.Main()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "instar-init: %v\n", err)
		os.Exit(1)
	}
}
