package ec2api

import (
	"context"
	"slices"

	"github.com/instar-image/instar/upload/catalog"
)

type filter struct {
	Name  string `q:"Name!"`
	Value []string
}

func filters(l []filter) []catalog.Filter {
	var out []catalog.Filter
	for _, f := range l {
		out = append(out, catalog.Filter{Name: f.Name, Values: f.Value})
	}
	return out
}

type describeImages struct {
	dry
	paging
	ImageID           []string `q:"ImageId"`
	Owner             []string
	ExecutableBy      []string
	Filter            []filter
	IncludeDeprecated bool
	IncludeDisabled   bool
}

type describeImagesReply struct {
	head
	ImagesSet items[imageItem] `xml:"imagesSet"`
	NextToken string           `xml:"nextToken,omitempty"`
}

func (s *Server) describeImages(ctx context.Context, c *call, in *describeImages) (reply, error) {
	if err := in.check(); err != nil {
		return nil, err
	}
	out, err := s.describe(ctx, c, in)
	if err != nil || s.o.ReadOnly || !slices.ContainsFunc(out.ImagesSet.Item, func(i imageItem) bool {
		return i.ImageState == string(catalog.Pending) && i.SourceInstanceID != ""
	}) {
		return out, err
	}
	// An agent makes some of them: it may be ready by now. Where that cannot be
	// found out the image is shown pending, as it is, and Work says why.
	_ = s.settle(ctx, c.account.id)
	return s.describe(ctx, c, in)
}

func (s *Server) describe(ctx context.Context, c *call, in *describeImages) (*describeImagesReply, error) {
	out := &describeImagesReply{}
	err := s.o.Catalog.Read(ctx, func(v *catalog.View) error {
		found, err := v.Describe(ctx, c.account.id, catalog.Query{
			IDs: in.ImageID, Owners: in.Owner, ExecutableBy: in.ExecutableBy, Filters: filters(in.Filter),
			IncludeDeprecated: in.IncludeDeprecated, IncludeDisabled: in.IncludeDisabled,
		})
		if err != nil {
			return err
		}
		found, out.NextToken, err = page(c, &in.paging, found, func(m *catalog.Image) string { return m.ID })
		if err != nil {
			return err
		}
		aliases := make(map[string]string)
		out.ImagesSet = items[imageItem]{}
		for _, m := range found {
			alias, known := aliases[m.Owner]
			if !known {
				a, err := v.Account(ctx, m.Owner)
				if err != nil {
					return err
				}
				if a != nil {
					alias = a.Alias
				}
				aliases[m.Owner] = alias
			}
			out.ImagesSet.Item = append(out.ImagesSet.Item, newImage(m, c.account.id, alias, s.o.Now()))
		}
		return nil
	})
	return out, err
}

type describeTags struct {
	dry
	paging
	Filter []filter
}

type describeTagsReply struct {
	head
	TagSet    items[taggedItem] `xml:"tagSet"`
	NextToken string            `xml:"nextToken,omitempty"`
}

type taggedItem struct {
	ResourceID   string `xml:"resourceId"`
	ResourceType string `xml:"resourceType"`
	Key          string `xml:"key"`
	Value        string `xml:"value"`
}

// describeTags lists the tags of what the caller owns.
func (s *Server) describeTags(ctx context.Context, c *call, in *describeTags) (reply, error) {
	if err := in.check(); err != nil {
		return nil, err
	}
	match, err := newMatcher(in.Filter, "key", "value", "resource-id", "resource-type", "tag-key", "tag-value", "tag:")
	if err != nil {
		return nil, err
	}
	out := &describeTagsReply{}
	err = s.o.Catalog.Read(ctx, func(v *catalog.View) error {
		var all []taggedItem
		add := func(id, kind string, tags catalog.Tags) {
			for _, k := range tags.Sorted() {
				t := taggedItem{id, kind, k, tags[k]}
				if match.all(func(name string) []string { return t.field(name) }) {
					all = append(all, t)
				}
			}
		}
		mine, err := v.Describe(ctx, c.account.id, catalog.Query{Owners: []string{"self"}, IncludeDeprecated: true, IncludeDisabled: true})
		if err != nil {
			return err
		}
		for _, m := range mine {
			add(m.ID, "image", m.Tags)
		}
		pairs, err := keyPairs(ctx, v, c.account.id)
		if err != nil {
			return err
		}
		for _, k := range pairs {
			add(k.ID, "key-pair", k.Tags)
		}
		all, out.NextToken, err = page(c, &in.paging, all, func(t taggedItem) string { return t.ResourceID + "\x00" + t.Key })
		out.TagSet = listOf(all)
		return err
	})
	return out, err
}

func (t *taggedItem) field(name string) []string {
	switch name {
	case "key", "tag-key":
		return []string{t.Key}
	case "value", "tag-value":
		return []string{t.Value}
	case "resource-id":
		return []string{t.ResourceID}
	case "resource-type":
		return []string{t.ResourceType}
	case "tag:" + t.Key:
		return []string{t.Value}
	}
	return nil
}
