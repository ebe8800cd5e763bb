package ec2api

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/catalog/sigv4"
	"github.com/instar-image/instar/upload/catalog/tasks"
)

// Names of services in a signature's scope.
const (
	serviceEC2 = "ec2"
	serviceSTS = "sts"
)

// Options say what to serve. Catalog, Accounts and Region are required.
type Options struct {
	Catalog *catalog.Catalog
	// Accounts gives those of now; a file that changed is read anew.
	Accounts func() *Accounts
	// Region is the catalog's own: requests are signed for it.
	Region string
	// Endpoint is what DescribeRegions tells of Region, as HOST or HOST:PORT;
	// default: the Host that the request names.
	Endpoint string
	// Regions are the others that images can be copied from.
	Regions []Region
	// Zones are the availability zones of Region; default one, Region and "a".
	Zones []string
	// Tasks drive agents; nil refuses BundleInstance and CreateImage.
	Tasks *tasks.Queue
	// Sources open the catalogs of other regions for CopyImage.
	Sources func(ctx context.Context, region string) (*catalog.Catalog, error)
	// ReadOnly refuses every action that changes something.
	ReadOnly bool
	// Now is the clock; default time.Now.
	Now func() time.Time
	// Report is told of every request; nil for none. It may be called
	// concurrently.
	Report func(*Record)
	// MaxTasks is how many tasks of an account may be unfinished, of all instances
	// together: of a fleet, one for each machine. Default 2,000.
	MaxTasks int
	// MaxImages is how many images of an account may be on their way at a time, copied,
	// stored or restored. Default 100.
	MaxImages int
}

// Region is another region of the same people.
type Region struct {
	Name     string
	Endpoint string // HOST or HOST:PORT
}

// Record is what became of a request.
type Record struct {
	ID       string
	Start    time.Time
	Duration time.Duration
	From     string // address and port
	Account  string // "" if not known
	Key      string // the access key's id
	Action   string // "" if not known to this server
	Code     string // of an error
	Err      error  // what the caller was not told
	Status   int
	Bytes    int // of the answer's body
}

// Server is an http.Handler.
type Server struct {
	o       Options
	actions map[string]action

	id    string        // of this server, among those that serve the catalog
	wake  chan struct{} // there is something to do
	busy  sync.Map      // ids of jobs being done here
	waits waits         // jobs that failed
}

// New makes a handler. It asks the store nothing.
func New(o Options) (*Server, error) {
	if o.Catalog == nil || o.Accounts == nil || o.Region == "" {
		return nil, errors.New("EC2 API: it needs a catalog, accounts and a region")
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.MaxTasks == 0 {
		o.MaxTasks = 2000
	}
	if o.MaxImages == 0 {
		o.MaxImages = 100
	}
	if len(o.Zones) == 0 {
		o.Zones = []string{o.Region + "a"}
	}
	return &Server{o: o, actions: actions(), id: newRequestID(), wake: make(chan struct{}, 1)}, nil
}

// Actions are the names of the actions there are.
func (s *Server) Actions() []string { return sortedKeys(s.actions) }

// call is a request whose signature is good.
type call struct {
	*Server
	accounts *Accounts
	account  *account
	key      string
	readOnly bool
	host     string
	action   string
	service  string
	signed   time.Time
	params   *params
}

// as is who asks, for the catalog.
func (c *call) as(dryRun bool) catalog.Call {
	return catalog.Call{Account: c.account.id, DryRun: dryRun, By: c.key}
}

// action is one of the API's.
type action struct {
	service string
	changes bool
	run     func(ctx context.Context, c *call) (reply, error)
}

// dry is embedded in the parameters of actions that can be tried.
type dry struct{ DryRun bool }

func (d *dry) isDry() bool { return d.DryRun }

// reads makes an action that changes nothing.
func reads[In any](f func(context.Context, *call, *In) (reply, error)) action {
	return action{service: serviceEC2, run: func(ctx context.Context, c *call) (reply, error) {
		in := new(In)
		if err := c.params.decode(in); err != nil {
			return nil, err
		}
		out, err := f(ctx, c, in)
		if d, ok := any(in).(interface{ isDry() bool }); err == nil && ok && d.isDry() {
			return nil, refuse(catalog.CodeDryRun, "Request would have succeeded, but DryRun flag is set.")
		}
		return out, err
	}}
}

// changes makes an action that changes something, and looks itself whether it
// is only tried.
func changes[In any](f func(context.Context, *call, *In) (reply, error)) action {
	return action{service: serviceEC2, changes: true, run: func(ctx context.Context, c *call) (reply, error) {
		in := new(In)
		if err := c.params.decode(in); err != nil {
			return nil, err
		}
		return f(ctx, c, in)
	}}
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rec := &Record{ID: newRequestID(), Start: s.o.Now(), From: r.RemoteAddr}
	body, service, err := s.serve(w, r, rec)
	rec.Status = http.StatusOK
	if err != nil {
		code, message := answer(err, service)
		rec.Code, rec.Status, rec.Err = code, status(code), err
		body = encodeError(service, code, message, rec.ID)
	}
	h := w.Header()
	h.Set("Content-Type", "text/xml;charset=UTF-8")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-cache, no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Amzn-Requestid", rec.ID)
	w.WriteHeader(rec.Status)
	n, werr := w.Write(body)
	rec.Bytes = n
	rec.Err = errors.Join(rec.Err, werr)
	rec.Duration = s.o.Now().Sub(rec.Start)
	if s.o.Report != nil {
		s.o.Report(rec)
	}
}

// requestTime is how long a request may take, once its body is here. None waits
// for bytes of images.
const requestTime = time.Minute

func (s *Server) serve(w http.ResponseWriter, r *http.Request, rec *Record) (doc []byte, service string, err error) {
	service = serviceEC2
	if err := methodAllowed(r); err != nil {
		return nil, service, err
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		var large *http.MaxBytesError
		if errors.As(err, &large) {
			return nil, service, refuse(codeTooLarge, "the request has more than %d bytes", maxBody)
		}
		return nil, service, refuse(codeMalformedQuery, "the request ended early")
	}
	accounts := s.o.Accounts()
	v := sigv4.Verifier{Key: accounts.lookup, Now: s.o.Now, Scope: func(region, svc string) bool {
		service = svc
		return region == s.o.Region && (svc == serviceEC2 || svc == serviceSTS)
	}}
	signed, err := v.Verify(r, body)
	if err != nil {
		return nil, service, err
	}
	who := accounts.keys[signed.KeyID]
	rec.Key, rec.Account = signed.KeyID, who.account.id
	c := &call{Server: s, accounts: accounts, account: who.account, key: signed.KeyID, readOnly: who.readOnly, host: r.Host, service: service, signed: signed.Time}
	if c.params, err = parseParams(r.URL.RawQuery, r.Header.Get("Content-Type"), body); err != nil {
		return nil, service, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTime)
	defer cancel()
	out, err := c.dispatch(ctx, rec)
	if err != nil {
		return nil, service, err
	}
	asked, err := version(c.params.values["Version"])
	if err != nil {
		return nil, service, err
	}
	namespace := "http://ec2.amazonaws.com/doc/" + asked + "/"
	if service == serviceSTS {
		namespace = "https://sts.amazonaws.com/doc/" + versionSTS + "/"
	}
	out.setRequestID(rec.ID)
	doc, err = encode(c.action, namespace, out)
	return doc, service, err
}

func (c *call) dispatch(ctx context.Context, rec *Record) (reply, error) {
	name, ok := c.params.get("Action")
	if !ok {
		return nil, missing("Action")
	}
	a, ok := c.actions[name]
	if !ok || a.service != c.service {
		return nil, refuse(codeInvalidAction, "the action %.100q is not valid for this web service", name)
	}
	c.action, rec.Action = name, name
	if _, err := version(c.params.values["Version"]); err != nil {
		return nil, err
	}
	if a.changes && (c.readOnly || c.o.ReadOnly) {
		return nil, refuse(catalog.CodeUnauthorized, "You are not authorized to perform this operation: the access key, or this server, may only read.")
	}
	// A presigned request lasts as long as it says, and goes through many hands:
	// it may read all that time, and be sent again for a change no longer than others.
	if now := c.o.Now(); a.changes && now.Sub(c.signed) > sigv4.Window {
		return nil, refuse(codeRequestExpired, "a request that changes something is good for %s, and it is of %s: sign it anew", sigv4.Window, timestamp(c.signed))
	}
	return a.run(ctx, c)
}
