package metadata

import (
	"net/netip"
	"time"
)

// Reporter is told of every request after its answer was written. Request is
// called concurrently and must not block or keep its argument.
type Reporter interface{ Request(*Request) }

// Request is what a Reporter is told. No field holds a token, credentials or
// user data.
type Request struct {
	Start    time.Time
	Duration time.Duration
	Instance string // "" if the caller is nobody's
	Caller   netip.AddrPort
	Listener string
	Method   string
	Path     string // without the query, at most 256 bytes
	Status   int
	Bytes    int    // of the body
	Token    string // "none", "valid", "bad", "issued", "" if it did not come to that
	// Note says why a request was refused or failed, or what it did beyond
	// answering ("launch: claimed again"). "" for most.
	Note string
}
