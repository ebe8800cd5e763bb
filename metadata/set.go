package metadata

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Source gives the records that are valid now.
type Source interface {
	// Instances returns the current set, never nil. It is called for every
	// request and must be cheap; a set never changes, a new one replaces it.
	Instances() *Set
}

// Static returns a Source of a set that stays as it is.
func Static(s *Set) Source { return static{s} }

type static struct{ set *Set }

func (s static) Instances() *Set { return s.set }

// Set is a number of instances, each of which can be found by its id and by
// its callers. It is immutable.
type Set struct {
	byID      map[string]*Instance
	byCaller  map[callerKey]*Instance
	listeners map[string]bool // that a record names
}

// callerKey is what a record is found by: an address, a listener's name, or both.
type callerKey struct {
	listener string
	addr     netip.Addr
}

// NewSet completes and checks the records and makes a set of them, which owns
// them from then on. Two records with one id, or that the same request could
// belong to, are errors; the error names all of them.
func NewSet(instances ...*Instance) (*Set, error) {
	s := &Set{
		byID:      make(map[string]*Instance, len(instances)),
		byCaller:  make(map[callerKey]*Instance, len(instances)),
		listeners: make(map[string]bool),
	}
	var errs []error
	for _, in := range instances {
		for _, p := range in.Complete() {
			errs = append(errs, fmt.Errorf("instance %q: %w", in.ID, p))
		}
		if s.byID[in.ID] != nil {
			errs = append(errs, fmt.Errorf("instance-id %q is used by two records", in.ID))
			continue
		}
		s.byID[in.ID] = in
		if err := s.addCallers(in); err != nil {
			errs = append(errs, err)
		}
	}
	for k, in := range s.byCaller {
		if other := s.byCaller[callerKey{listener: k.listener}]; k.listener != "" && k.addr.IsValid() && other != nil {
			errs = append(errs, fmt.Errorf("listener %q is all of instance %q's, so that instance %q cannot have %s on it: give both of them caller.addresses", k.listener, other.ID, in.ID, k.addr))
		}
	}
	if errs != nil {
		slices.SortFunc(errs, func(a, b error) int { return cmp.Compare(a.Error(), b.Error()) })
		return nil, errors.Join(errs...)
	}
	return s, nil
}

func (s *Set) addCallers(in *Instance) error {
	l := in.Caller.Listener
	keys := []callerKey{{listener: l}}
	if n := len(in.Caller.Addresses); n > 0 {
		keys = make([]callerKey, n)
		for i, a := range in.Caller.Addresses {
			keys[i] = callerKey{l, a}
		}
	}
	if l != "" {
		s.listeners[l] = true
	}
	for _, k := range keys {
		if other := s.byCaller[k]; other != nil && other != in {
			what := k.addr.String()
			if !k.addr.IsValid() {
				what = "listener " + l
			}
			return fmt.Errorf("instances %q and %q have the same caller, %s", other.ID, in.ID, what)
		}
		s.byCaller[k] = in
	}
	return nil
}

// Len returns the number of instances.
func (s *Set) Len() int { return len(s.byID) }

// Footprint is about how many bytes of memory the set takes.
func (s *Set) Footprint() int64 {
	n := int64(len(s.byID)) * 4096
	for _, in := range s.byID {
		n += int64(len(in.UserData))
	}
	return n
}

// Get returns the instance with the id, nil if there is none.
func (s *Set) Get(id string) *Instance { return s.byID[id] }

// IDs returns every instance id, sorted.
func (s *Set) IDs() []string {
	ids := make([]string, 0, len(s.byID))
	for id := range s.byID {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// find returns the instance a connection belongs to, nil if to none. names are
// what the listener is known by: its name and its interface's, where it has them.
func (s *Set) find(addr netip.Addr, names ...string) *Instance {
	claimed := false
	for _, name := range names {
		if name == "" || !s.listeners[name] {
			continue
		}
		claimed = true
		if in := s.byCaller[callerKey{name, addr}]; in != nil {
			return in
		}
		if addr.Zone() != "" {
			if in := s.byCaller[callerKey{name, addr.WithZone("")}]; in != nil {
				return in
			}
		}
		if in := s.byCaller[callerKey{listener: name}]; in != nil {
			return in
		}
	}
	if claimed {
		return nil
	}
	return s.byCaller[callerKey{addr: addr}]
}

// State holds what changes while instances run: token keys, events,
// withdrawals. Its methods may be called concurrently.
type State interface {
	// TokenKeys returns the keys that tokens are made with: the first signs,
	// all of them verify. At least one, each of 32 bytes. Cheap.
	TokenKeys() []TokenKey
	// Live returns what is known of an instance, the zero Live if nothing.
	// Cheap; the result is not changed afterwards.
	Live(id string) Live
	// Update changes what is known of an instance. The change is durable,
	// and seen by Live, when Update returns nil. change may be called more
	// than once, with what is then the latest; if it fails, nothing changes
	// and Update returns its error.
	Update(ctx context.Context, id string, change func(*Live) error) error
}

// TokenKey is a secret that tokens are made with.
type TokenKey struct {
	ID     byte // tells keys apart in a token
	Secret [32]byte
}

// Live is what is known of a running instance beside its record.
type Live struct {
	// Generation is part of every token: raising it revokes those given out.
	Generation uint64 `json:"generation,omitempty"`
	// Events, if not nil, replace the record's.
	Events *Events     `json:"events,omitempty"`
	Ticket TicketState `json:"ticket,omitzero"`
}

// TicketState says how far a launch ticket has got. It belongs to the
// launch that Launch names: a record with another one begins anew.
type TicketState struct {
	Launch    string `json:"launch,omitempty"`    // see package launch
	Claims    int    `json:"claims,omitempty"`    // tickets given, the first included
	Renewals  int    `json:"renewals,omitempty"`  // of credentials, by a ticket's holder
	Holder    string `json:"holder,omitempty"`    // who claimed last, a digest of its recipient
	Completed bool   `json:"completed,omitempty"` // withdrawn
}
