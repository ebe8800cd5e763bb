package web

import (
	"context"
	"net/http"
	"strings"

	"github.com/instar-image/instar/upload/catalog"
)

// imagePage is what the page of an image shows.
type imagePage struct {
	*catalog.Image
	Name       string // never empty
	OwnerName  string // the alias, "" if it has none
	Mine       bool   // of the account whose view this is
	Deprecated bool
	Protection string
	Tags       []tag
	Guide      []block // the getting-started page
	Permission string  // in words
	Launch     string  // the command
	Region     string
	Sequence   int64
	Signer     string // of the catalog's entry
	Shared     int64  // bytes that were in the store before
	History    []catalog.Change
}

type tag struct{ Key, Value string }

func (s *site) image(ctx context.Context, r *http.Request) (string, any, error) {
	id := r.PathValue("id")
	var p *imagePage
	err := s.o.Catalog.Read(ctx, func(v *catalog.View) error {
		if catalog.CheckID(id) != nil {
			return errNotFound
		}
		m, err := v.Image(ctx, id)
		if err != nil {
			return err
		}
		if m == nil || !s.visible(m) {
			return errNotFound
		}
		names, err := aliases(ctx, v)
		if err != nil {
			return err
		}
		p = s.imagePage(m, v, names[m.Owner])
		return nil
	})
	return "image", p, err
}

func (s *site) imagePage(m *catalog.Image, v *catalog.View, alias string) *imagePage {
	now := s.o.Now()
	p := &imagePage{
		Image: m, Name: m.Name, OwnerName: alias, Mine: m.Owner == s.o.Account, Deprecated: m.IsDeprecated(now), Protection: m.ProtectionText(now),
		Guide: parseMarkdown(m.GettingStarted), Launch: s.launch(m), Region: v.Region(), Sequence: v.Sequence(), Signer: v.Signer(),
		Shared: max(0, m.Stored-m.Added),
	}
	if p.Name == "" {
		p.Name = m.ID
	}
	if m.Kind != catalog.KindInstar {
		p.Shared = 0
	}
	switch {
	case m.Public:
		p.Permission = "Everybody may launch it."
	case !p.Mine:
		p.Permission = "It is shared with you."
	case len(m.LaunchAccounts)+len(m.LaunchOrgs)+len(m.LaunchOrgUnits) == 0:
		p.Permission = "Only its owner may launch it."
	default:
		p.Permission = "Its owner and those named here may launch it."
	}
	// What others are not to know is not shown to them, as in the API.
	if p.Mine {
		for _, k := range m.Tags.Sorted() {
			p.Tags = append(p.Tags, tag{k, m.Tags[k]})
		}
		for i := len(m.History) - 1; i >= 0; i-- {
			p.History = append(p.History, m.History[i])
		}
	}
	return p
}

// launch is the command that starts the image. Whatever a name holds, a shell
// takes the id for a word.
func (s *site) launch(m *catalog.Image) string {
	var b strings.Builder
	b.WriteString(s.o.Launch + " " + m.ID)
	for _, p := range m.Parameters {
		if p.Required || p.Default == "" {
			b.WriteString(" --parameter " + p.Name + "=…")
		}
	}
	return b.String()
}
