// Command instar captures a running machine's root filesystem into S3-compatible
// storage or a directory, as an Instar image or as an EC2 bundle, brings it back,
// boots it, and runs what belongs to that: the agent of a machine, the servers of
// metadata and of a catalog, the cache of a host.
//
// A file here is a command's options and help (restore.go) or what it does
// (run_restore.go); what is done is done by the packages of the module.
//
// It speaks as ec2-ami-tools and euca2ools do: a link named ec2-bundle-vol or
// euca-bundle-vol is the command bundle-vol with that family's conventions.
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// version is set when linking.
var version = "devel"

func main() {
	// The words are copied, so that secrets among them can be overwritten
	// where ps(1) reads them.
	args := make([]string, len(os.Args))
	for i, a := range os.Args {
		args[i] = strings.Clone(a)
	}
	os.Exit(run(args, os.Stdin, os.Stdout, os.Stderr, os.Getenv))
}

// run is the program: args[0] is the name it was called by. The first signal
// cancels what runs, which cleans up; the second kills.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer, getenv func(string) string) int {
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // nohup(1) stays in force
		signals = append(signals, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), signals...)
	defer stop()
	context.AfterFunc(ctx, stop)
	a := newApp(args, stdin, stdout, stderr, getenv)
	return a.run(ctx, args)
}
