package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"reflect"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/middleware"
)

// driver is one run.
type driver struct {
	url, url2, region, other, bucket, bucket2, location string

	ctx context.Context //nolint:containedctx // of the run; the scenes have no other
	now time.Time       // its beginning

	alice, reader, bob, temporary, there, bobThere *caller

	id, named, source string // images: a plain one, one with all there is, one of the bundle

	lines   []*line
	covered map[string]map[string]bool // of each action, the parameters that were sent
	calls   map[string]int
	faults  int
}

// caller is somebody who asks a server.
type caller struct {
	d      *driver
	ec2    *ec2.Client
	sts    *sts.Client
	wire   *wire
	region string
}

// connect makes the clients.
func (d *driver) connect() {
	d.alice = d.caller("AKALICE", "alice-secret-key", "", d.url, d.region)
	d.reader = d.caller("AKREADER", "reader-secret-key", "", d.url, d.region)
	d.bob = d.caller("AKBOB", "bob-secret-key", "", d.url, d.region)
	d.temporary = d.caller("AKTEMP", "temporary-secret-key", "a/session+token=", d.url, d.region)
	d.there = d.caller("AKALICE", "alice-secret-key", "", d.url2, d.other)
	d.bobThere = d.caller("AKBOB", "bob-secret-key", "", d.url2, d.other)
}

func (d *driver) caller(key, secret, token, url, region string) *caller {
	w := &wire{d: d, region: region, client: &http.Client{Timeout: 2 * time.Minute}}
	creds := credentials.NewStaticCredentialsProvider(key, secret, token)
	retryer := func() aws.Retryer {
		return retry.NewStandard(func(o *retry.StandardOptions) { o.Backoff = soon{} })
	}
	return &caller{
		d: d, wire: w, region: region,
		ec2: ec2.New(ec2.Options{Region: region, BaseEndpoint: aws.String(url), Credentials: creds, HTTPClient: w, HTTPSignerV4: w, Retryer: retryer()}),
		sts: sts.New(sts.Options{Region: region, BaseEndpoint: aws.String(url), Credentials: creds, HTTPClient: w, HTTPSignerV4: w, Retryer: retryer()}),
	}
}

// soon tries again without waiting for long.
type soon struct{}

func (soon) BackoffDelay(int, error) (time.Duration, error) { return 10 * time.Millisecond, nil }

func (d *driver) fault(format string, a ...any) {
	d.faults++
	fmt.Fprintf(os.Stderr, "FAULT "+format+"\n", a...)
}

// actionOf is the action whose parameters in points to.
func actionOf(in any) string {
	return strings.TrimSuffix(reflect.TypeOf(in).Elem().Name(), "Input")
}

// ask makes a call and notes what the SDK made of the answer.
func ask[In, Out, Opt any](c *caller, op func(context.Context, *In, ...func(*Opt)) (*Out, error), in *In) (*Out, error) {
	action := actionOf(in)
	c.d.calls[action]++
	c.d.cover(action, in)
	c.wire.action = action
	out, err := op(c.d.ctx, in)
	if len(c.d.lines) == 0 {
		return out, err
	}
	l := c.d.lines[len(c.d.lines)-1]
	if err != nil {
		var refusal smithy.APIError
		if errors.As(err, &refusal) {
			l.Code = refusal.ErrorCode()
		}
		var id interface{ ServiceRequestID() string }
		if errors.As(err, &id) && id.ServiceRequestID() == "" {
			c.d.fault("%s: an error without the request's id: %v", action, err)
		}
		return out, err
	}
	l.Output = typed(out)
	meta, _ := reflect.ValueOf(out).Elem().FieldByName("ResultMetadata").Interface().(middleware.Metadata)
	if id, ok := awsmiddleware.GetRequestIDMetadata(meta); !ok || len(id) != 36 {
		c.d.fault("%s: the answer's request id is %q", action, id)
	}
	return out, nil
}

// done makes a call that must end well.
func done[In, Out, Opt any](c *caller, op func(context.Context, *In, ...func(*Opt)) (*Out, error), in *In) *Out {
	out, err := ask(c, op, in)
	if err != nil {
		c.d.fault("%s: %v", actionOf(in), err)
		return new(Out)
	}
	return out
}

// refused makes a call that must end with an error of that code.
func refused[In, Out, Opt any](c *caller, code string, op func(context.Context, *In, ...func(*Opt)) (*Out, error), in *In) {
	_, err := ask(c, op, in)
	var refusal smithy.APIError
	switch {
	case err == nil:
		c.d.fault("%s was done, want %s", actionOf(in), code)
	case !errors.As(err, &refusal):
		c.d.fault("%s: %v, want %s", actionOf(in), err, code)
	case refusal.ErrorCode() != code || refusal.ErrorMessage() == "":
		c.d.fault("%s: %s: %q, want %s", actionOf(in), refusal.ErrorCode(), refusal.ErrorMessage(), code)
	}
}

// is compares what an answer says.
func is[T comparable](d *driver, what string, got, want T) {
	if got != want {
		d.fault("%s is %v, want %v", what, got, want)
	}
}
