package watch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/instar-image/instar/metadata/imds"
)

// Notice is metadata's word that the machine will be interrupted.
type Notice struct {
	Kind   string    // spot, rebalance or maintenance
	ID     string    // the same for the same interruption: at most 64 printable characters
	Action string    // terminate, stop, hibernate; of maintenance its code, as instance-retirement
	Time   time.Time // when; of maintenance not before which. Zero if it is not told
	Text   string    // of maintenance its description
}

// Facts are a notice's for hooks.
func (n Notice) Facts() map[string]string {
	f := map[string]string{"notice": n.Kind, "notice-id": n.ID, "notice-action": n.Action, "notice-text": n.Text}
	if !n.Time.IsZero() {
		f["notice-time"] = n.Time.UTC().Format(time.RFC3339)
	}
	return f
}

// String is one line.
func (n Notice) String() string {
	s := n.Kind + " notice: " + n.Action
	if !n.Time.IsZero() {
		s += " at " + n.Time.UTC().Format(time.RFC3339)
	}
	return s
}

// Kinds of notices.
const (
	Spot        = "spot"        // spot/instance-action: two minutes ahead
	Rebalance   = "rebalance"   // events/recommendations/rebalance: the machine is at higher risk
	Maintenance = "maintenance" // events/maintenance/scheduled
)

// Kinds are all kinds of notices.
func Kinds() []string { return []string{Spot, Rebalance, Maintenance} }

// DefaultInterval is the time between two looks: EC2 asks for 5 seconds, and
// gives a spot instance two minutes.
const DefaultInterval = 5 * time.Second

// NoticeOptions say what is looked for.
type NoticeOptions struct {
	Endpoint string        // of the metadata service; "": imds.DefaultEndpoint
	Interval time.Duration // 0: DefaultInterval
	Kinds    []string      // nil: spot and maintenance
	// OnNotice is called once for each interruption, one after the other. If it
	// fails it is called again after the next look.
	OnNotice func(context.Context, Notice) error
	// Report is told, once, what keeps the service from being asked.
	Report func(line string, warn bool)

	after func(time.Duration) <-chan time.Time // nil: time.After
}

// maxEvents bounds the maintenance events that are looked at.
const maxEvents = 100

// WatchNotices asks metadata again and again until ctx ends. It returns only
// then, or at once if the options cannot be meant.
func WatchNotices(ctx context.Context, o NoticeOptions) error {
	if o.Interval <= 0 {
		o.Interval = DefaultInterval
	}
	if o.Kinds == nil {
		o.Kinds = []string{Spot, Maintenance}
	}
	for _, k := range o.Kinds {
		if !slices.Contains(Kinds(), k) {
			return fmt.Errorf("unknown kind of notice %q: there are %v", k, Kinds())
		}
	}
	if o.Report == nil {
		o.Report = func(string, bool) {}
	}
	if o.after == nil {
		o.after = time.After
	}
	client, err := imds.New(imds.Options{Endpoint: o.Endpoint, TokensOnly: true})
	if err != nil {
		return err
	}
	done := make(map[string]bool)
	trouble := ""
	for {
		notices, err := look(ctx, client, o.Kinds)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		switch {
		case err == nil && trouble != "":
			o.Report("metadata answers again", false)
			trouble = ""
		case err != nil && err.Error() != trouble:
			trouble = err.Error()
			o.Report("looking for notices: "+trouble, true)
		}
		seen := make(map[string]bool)
		for _, n := range notices {
			key := n.Kind + " " + n.ID
			seen[key] = true
			if done[key] {
				continue
			}
			o.Report(n.String(), true)
			if err := o.OnNotice(ctx, n); err != nil {
				o.Report(fmt.Sprintf("%s: %v; it is tried again", n, err), true)
				continue
			}
			done[key] = true
		}
		if err == nil {
			// What is withdrawn and given again is given anew.
			for k := range done {
				if !seen[k] {
					delete(done, k)
				}
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-o.after(o.Interval):
		}
	}
}

// look asks for all kinds once. What can be asked is given beside an error.
func look(ctx context.Context, c *imds.Client, kinds []string) ([]Notice, error) {
	var all []Notice
	var errs []error
	for _, k := range kinds {
		var path string
		var parse func([]byte) ([]Notice, error)
		switch k {
		case Spot:
			path, parse = "spot/instance-action", parseSpot
		case Rebalance:
			path, parse = "events/recommendations/rebalance", parseRebalance
		case Maintenance:
			path, parse = "events/maintenance/scheduled", parseMaintenance
		}
		text, err := c.Get(ctx, path)
		if errors.Is(err, imds.ErrNotFound) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			if errors.Is(err, imds.ErrUnreachable) {
				break
			}
			continue
		}
		found, err := parse([]byte(text))
		if err != nil {
			errs = append(errs, fmt.Errorf("metadata's %s: %w", path, err))
			continue
		}
		all = append(all, found...)
	}
	return all, errors.Join(errs...)
}

// parseSpot reads {"action":"terminate","time":"2017-09-18T08:22:00Z"}.
func parseSpot(data []byte) ([]Notice, error) {
	var d struct {
		Action string    `json:"action"`
		Time   time.Time `json:"time"`
	}
	if err := decode(data, &d); err != nil {
		return nil, err
	}
	switch d.Action {
	case "stop", "terminate", "hibernate":
	default:
		return nil, fmt.Errorf("unknown action %q", d.Action)
	}
	return []Notice{{Kind: Spot, Action: d.Action, Time: d.Time, ID: "spot-" + d.Action + "-" + d.Time.UTC().Format("20060102T150405Z")}}, nil
}

// parseRebalance reads {"noticeTime":"2020-10-27T08:22:00Z"}.
func parseRebalance(data []byte) ([]Notice, error) {
	var d struct {
		NoticeTime time.Time `json:"noticeTime"`
	}
	if err := decode(data, &d); err != nil {
		return nil, err
	}
	return []Notice{{Kind: Rebalance, Action: "rebalance", Time: d.NoticeTime, ID: "rebalance-" + d.NoticeTime.UTC().Format("20060102T150405Z")}}, nil
}

// maintenanceTime is how EC2 writes the times of events.
const maintenanceTime = "2 Jan 2006 15:04:05 MST"

// parseMaintenance reads the list of scheduled events; those that are active
// are notices.
func parseMaintenance(data []byte) ([]Notice, error) {
	var list []struct {
		NotBefore, Code, Description, EventID, NotAfter, State string
	}
	if err := decode(data, &list); err != nil {
		return nil, err
	}
	if len(list) > maxEvents {
		return nil, fmt.Errorf("more than %d events", maxEvents)
	}
	var all []Notice
	for _, e := range list {
		if e.State != "active" {
			continue // completed or canceled
		}
		if !plain(e.EventID) || !plain(e.Code) {
			return nil, fmt.Errorf("an event's id %.80q or code %.80q is no word", e.EventID, e.Code)
		}
		at, err := time.Parse(maintenanceTime, e.NotBefore)
		if err != nil {
			return nil, fmt.Errorf("event %s: its time: %w", e.EventID, err)
		}
		all = append(all, Notice{Kind: Maintenance, ID: e.EventID, Action: e.Code, Time: at, Text: e.Description})
	}
	return all, nil
}

// decode reads one JSON value; names may be in any case, as EC2's are.
func decode(data []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(v); err != nil {
		return err
	}
	if dec.More() {
		return errors.New("more than one value")
	}
	return nil
}

// plain tells whether s is a word of at most 64 printable characters.
func plain(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c >= 0x7f {
			return false
		}
	}
	return true
}
