// Command catalogsdk drives a catalog's servers with the AWS SDK for Go: every
// action they know, each parameter the SDK has for it, paginators, waiters, typed
// errors, retries, clocks that are wrong. It says what is not as the SDK's users
// would expect it, and records each request with what the SDK made of the answer:
//
//	catalogsdk -url URL -url2 URL -region NAME -other NAME -bucket NAME -bucket2 NAME -location BUCKET/KEY [-record FILE]
//
// The servers are of two regions, url2's of the other, and their accounts those of
// test/catalog, which starts it; location is that of the bundle
// bundle/ec2/testdata/fixtures/ec2-full, in bucket; and somebody completes what the
// instance i-agent is asked to bundle, and fails what it is asked to make an image
// of. The command reads no configuration and no environment of the SDK's.
//
// It is a module of its own, because the SDK's package for EC2 takes minutes to
// compile.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// Those who ask: the accounts' file of test/catalog has them.
const (
	alice = "111122223333"
	bob   = "222233334444"
)

func main() {
	d := &driver{covered: map[string]map[string]bool{}, calls: map[string]int{}}
	flag.StringVar(&d.url, "url", "", "`URL` of the server")
	flag.StringVar(&d.url2, "url2", "", "`URL` of the other region's server")
	flag.StringVar(&d.region, "region", "", "the server's region")
	flag.StringVar(&d.other, "other", "", "the other region")
	flag.StringVar(&d.bucket, "bucket", "", "the bucket that bundles go to")
	flag.StringVar(&d.bucket2, "bucket2", "", "another bucket, for images as objects")
	flag.StringVar(&d.location, "location", "", "where the bundle lies, BUCKET/KEY of its manifest")
	record := flag.String("record", "", "write the record to `FILE`")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := d.drive(ctx, *record); err != nil {
		fmt.Fprintln(os.Stderr, "catalogsdk:", err)
		os.Exit(1)
	}
}

// drive goes through all there is, in an order in which a replay can follow: what
// goes on in the background is waited for before anything is asked that would show
// how far it is.
func (d *driver) drive(ctx context.Context, record string) error {
	d.ctx = ctx
	d.now = time.Now().UTC().Truncate(time.Minute)
	d.connect()
	d.images()
	d.attributes()
	d.lists()
	d.tagsAndKeys()
	d.places()
	d.copies()
	d.bundles()
	d.stores()
	d.strangers()
	d.answersLost()
	d.clocks()
	d.dryRuns()
	d.uncovered()
	if d.faults > 0 {
		return fmt.Errorf("%d faults", d.faults)
	}
	if record != "" {
		if err := d.save(record); err != nil {
			return err
		}
	}
	total := 0
	for _, n := range d.calls {
		total += n
	}
	fmt.Printf("%d calls of %d actions and waiters, %d requests recorded\n", total, len(d.calls), len(d.lines))
	return ctx.Err()
}
