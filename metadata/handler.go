package metadata

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Options say what a handler serves. Only Source is required.
type Options struct {
	Source   Source
	State    State    // default NewState()
	Signer   *Signer  // without one identity documents are not signed
	Keys     *KeyRing // default: one that cannot mint
	Launcher Launcher // without one there are no launch tickets
	// AnyPort lets tickets be asked for from source ports of 1024 and above,
	// which need no root: only for a private server, whose callers' ports
	// are not their own (QEMU's user networking).
	AnyPort  bool
	Reporter Reporter
	// Rate and Burst limit each instance's requests a second; beyond them
	// the answer is 429. Default 500 and 1,000; a negative Rate is no limit.
	Rate  float64
	Burst int
	// Hosts are further names that clients may call the server by. IP
	// addresses, localhost and instance-data always are; any other Host
	// header is refused, so that no web page can rebind a name to us.
	Hosts []string
	// Neighbours looks an address up in the kernel's neighbour table.
	// Without it, records that ask for a MAC address are never found.
	Neighbours Neighbours
}

// Neighbours gives the MAC address, lower case with colons, that the kernel
// has for a neighbour on an interface ("": on any).
type Neighbours interface {
	MAC(iface string, addr netip.Addr) (string, error)
}

// Handler answers metadata requests. It is made by [New].
type Handler struct {
	source   Source
	state    State
	signer   *Signer
	keys     *KeyRing
	launcher Launcher
	anyPort  bool
	reporter Reporter
	hosts    map[string]bool
	near     Neighbours
	tree     *node
	mint     minter
	pages    map[int]string

	rate     rate.Limit
	burst    int
	limiters sync.Map // instance id: *rate.Limiter; "" for strangers

	plain, binary, html, server, closing []string // header values
	lengths                              [512][]string
}

var _ http.Handler = (*Handler)(nil)

// New returns a handler. It must see the connections it serves by way of
// [ConnContext]; package server does that.
func New(o Options) (*Handler, error) {
	if o.Source == nil {
		return nil, errors.New("metadata: no source of instances")
	}
	h := &Handler{
		source: o.Source, state: o.State, signer: o.Signer, keys: o.Keys, launcher: o.Launcher, anyPort: o.AnyPort,
		reporter: o.Reporter, near: o.Neighbours, tree: newTree(), rate: rate.Limit(o.Rate), burst: o.Burst,
		hosts: map[string]bool{"": true, "localhost": true, "instance-data": true, "instance-data.ec2.internal": true},
		pages: make(map[int]string),
		plain: []string{"text/plain"}, binary: []string{"application/octet-stream"}, html: []string{"text/html"},
		server: []string{"EC2ws"}, closing: []string{"close"},
	}
	if h.state == nil {
		h.state = NewState()
	}
	if h.keys == nil {
		h.keys = NewKeyRing(nil)
	}
	if h.rate == 0 {
		h.rate = 500
	}
	if h.burst <= 0 {
		h.burst = max(int(2*h.rate), 1)
	}
	for _, name := range o.Hosts {
		h.hosts[strings.ToLower(name)] = true
	}
	for n := range h.lengths {
		h.lengths[n] = []string{strconv.Itoa(n)}
	}
	for status := 400; status < 600; status++ {
		if text := http.StatusText(status); text != "" {
			h.pages[status] = errorPage(fmt.Sprintf("%d - %s", status, text))
		}
	}
	return h, nil
}

func errorPage(title string) string {
	return `<?xml version="1.0" encoding="iso-8859-1"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN"
	"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml" xml:lang="en" lang="en">
 <head>
  <title>` + title + `</title>
 </head>
 <body>
  <h1>` + title + `</h1>
 </body>
</html>
`
}

// errAbsent is a leaf that turned out not to be there.
var errAbsent = errors.New("absent")

// ServeHTTP answers one request and reports it.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e := exchange{h: h, w: w, r: r}
	e.rep.Start = time.Now()
	e.serve()
	if h.reporter != nil {
		e.rep.Method, e.rep.Path = r.Method, r.URL.Path
		if len(e.rep.Path) > 256 {
			e.rep.Path = e.rep.Path[:256]
		}
		e.rep.Duration = time.Since(e.rep.Start)
		h.reporter.Request(&e.rep)
	}
}

// exchange is one request on its way to its answer.
type exchange struct {
	h    *Handler
	w    http.ResponseWriter
	r    *http.Request
	conn *connection // nil if the connection is not known
	in   *Instance
	live Live
	rep  Request
}

// serve checks, in this order: who is calling, how often, by what name,
// whether the service is on; then it routes.
func (e *exchange) serve() {
	h := e.h
	e.w.Header()["Server"] = h.server
	if e.r.ContentLength != 0 { // whatever follows a body is not read as a request
		e.w.Header()["Connection"] = h.closing
	}
	if !e.identify() {
		if !h.allow("", e.rep.Start) {
			e.fail(http.StatusTooManyRequests, "rate limit for strangers")
			return
		}
		e.w.Header()["Connection"] = h.closing // strangers hold nothing
		e.fail(http.StatusNotFound, e.rep.Note)
		return
	}
	e.rep.Instance = e.in.ID
	switch {
	case !h.allow(e.in.ID, e.rep.Start):
		e.w.Header().Set("Retry-After", "1")
		e.fail(http.StatusTooManyRequests, "rate limit")
		return
	case !h.knownHost(e.r.Host):
		e.fail(http.StatusMisdirectedRequest, "unknown Host header")
		return
	case e.in.Metadata.Endpoint == "disabled":
		e.fail(http.StatusForbidden, "http-endpoint is disabled")
		return
	case e.in.Metadata.IPv6 == "disabled" && !e.rep.Caller.Addr().Is4():
		e.fail(http.StatusForbidden, "http-protocol-ipv6 is disabled")
		return
	}
	e.live = h.state.Live(e.in.ID)
	version, rest := segment(e.r.URL.Path)
	if api, sub := segment(rest); api == "api" {
		if name, end := segment(sub); name == "token" && strings.Trim(end, "/") == "" {
			e.tokenRequest(version)
			return
		} else if name == "instar" && version == "latest" && h.launcher != nil {
			e.launchRequest(end)
			return
		}
	}
	if e.r.Method != http.MethodGet && e.r.Method != http.MethodHead {
		e.w.Header().Set("Allow", "GET, HEAD")
		e.fail(http.StatusMethodNotAllowed, "")
		return
	}
	if !e.checkToken(e.in.Metadata.Tokens == "required") {
		return
	}
	e.get(version, rest)
}

// segment cuts the first segment off a path; any number of slashes separates.
func segment(path string) (first, rest string) {
	first, rest, _ = strings.Cut(strings.TrimLeft(path, "/"), "/")
	return first, strings.TrimLeft(rest, "/")
}

func (h *Handler) allow(id string, now time.Time) bool {
	if h.rate < 0 {
		return true
	}
	l, ok := h.limiters.Load(id)
	if !ok {
		l, _ = h.limiters.LoadOrStore(id, rate.NewLimiter(h.rate, h.burst))
	}
	return l.(*rate.Limiter).AllowN(now, 1)
}

func (h *Handler) knownHost(host string) bool {
	if host == "169.254.169.254" {
		return true
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	if _, err := netip.ParseAddrPort(host); err == nil {
		return true
	}
	if _, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")); err == nil {
		return true
	}
	host, _, _ = strings.Cut(host, ":")
	return h.hosts[strings.ToLower(strings.TrimSuffix(host, "."))]
}

func known(version string) bool {
	if version == "latest" {
		return true
	}
	for _, v := range versions {
		if v == version {
			return true
		}
	}
	return false
}

// get answers a GET or HEAD of the tree.
func (e *exchange) get(version, path string) {
	if version == "" {
		e.reply(http.StatusOK, e.h.plain, strings.Join(versions, "\n"))
		return
	}
	if !known(version) {
		e.fail(http.StatusNotFound, "")
		return
	}
	v := view{h: e.h, in: e.in, live: e.live, version: version, now: e.rep.Start}
	n := e.h.tree.walk(&v, path)
	switch {
	case n == nil:
		e.fail(http.StatusNotFound, "")
	case n == e.h.tree: // EC2 lists these three without slashes
		body := e.h.tree.list(&v)
		e.reply(http.StatusOK, e.h.plain, strings.ReplaceAll(body, "/", ""))
	case n.fetch != nil:
		body, err := n.fetch(e.r.Context(), &v)
		switch {
		case errors.Is(err, errAbsent):
			e.fail(http.StatusNotFound, "")
		case err != nil:
			e.fail(http.StatusServiceUnavailable, err.Error())
		default:
			e.reply(http.StatusOK, e.h.plain, body)
		}
	case n.leaf != nil:
		body, ok := n.leaf(&v)
		if !ok {
			e.fail(http.StatusNotFound, "")
			return
		}
		e.reply(http.StatusOK, e.h.plain, body)
	case n.raw != nil:
		body := n.raw(&v)
		if body == nil {
			e.fail(http.StatusNotFound, "")
			return
		}
		e.replyBytes(http.StatusOK, e.h.binary, body)
	case !n.present(&v):
		e.fail(http.StatusNotFound, "")
	default:
		e.reply(http.StatusOK, e.h.plain, n.list(&v))
	}
}

// maxLaunchBody is the most a ticket request's body may have, in bytes.
const maxLaunchBody = 4096

// launchRequest hands the requests below latest/api/instar to the Launcher,
// once it is sure that a privileged process of the instance itself asks.
func (e *exchange) launchRequest(path string) {
	name, sub := segment(path)
	what, end := segment(sub)
	if name != "launch" || (what != "" && what != "complete") || end != "" || e.in.Launch == nil {
		if e.checkToken(true) {
			e.fail(http.StatusNotFound, "")
		}
		return
	}
	if e.r.Method != http.MethodPost {
		e.w.Header().Set("Allow", "POST")
		e.fail(http.StatusMethodNotAllowed, "")
		return
	}
	if !e.checkToken(true) {
		return
	}
	if _, ok := e.r.Header["X-Forwarded-For"]; ok {
		e.fail(http.StatusForbidden, "launch: asked for through a proxy (X-Forwarded-For)")
		return
	}
	if port := e.rep.Caller.Port(); !e.h.anyPort && (port == 0 || port >= 1024) {
		e.fail(http.StatusForbidden, "launch: source port is not below 1024")
		return
	}
	body, err := io.ReadAll(io.LimitReader(e.r.Body, maxLaunchBody+1))
	if err != nil || len(body) > maxLaunchBody {
		e.fail(http.StatusBadRequest, "launch: body missing, broken off or over 4096 bytes")
		return
	}
	// What follows may take longer than sending a request may. That a writer
	// cannot be told so only means that it has no such limit.
	_ = http.NewResponseController(e.w).SetReadDeadline(time.Time{})
	ctx := withNote(e.r.Context(), &e.rep.Note)
	var answer []byte
	if what == "complete" {
		err = e.h.launcher.Complete(ctx, e.in, body)
	} else {
		answer, err = e.h.launcher.Claim(ctx, e.in, body)
	}
	var refused *Refusal
	switch {
	case errors.As(err, &refused):
		e.rep.Note = "launch: " + refused.Reason
		e.reply(refused.Status, e.h.plain, strings.ReplaceAll(refused.Reason, "\n", " ")+"\n") // one line
	case err != nil:
		e.fail(http.StatusServiceUnavailable, "launch: "+err.Error())
	case what == "complete":
		e.w.WriteHeader(http.StatusNoContent)
		e.rep.Status = http.StatusNoContent
	default:
		e.replyBytes(http.StatusOK, e.h.binary, answer)
	}
}
