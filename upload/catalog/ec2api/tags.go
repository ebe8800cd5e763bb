package ec2api

import (
	"context"

	"github.com/instar-image/instar/upload/catalog"
)

type tagParam struct {
	Key   string `q:"Key!"`
	Value *string
}

type tagSpecification struct {
	ResourceType string
	Tag          []tagParam
}

// tagsOf are the tags a request wants new resources of a kind to have.
func tagsOf(specs []tagSpecification, kinds ...string) (catalog.Tags, error) {
	tags := catalog.Tags{}
	for _, s := range specs {
		known := false
		for _, k := range kinds {
			known = known || s.ResourceType == k
		}
		if !known {
			return nil, refuse(catalog.CodeParameterValue, "'%.100s' is not a valid taggable resource type for this operation.", s.ResourceType)
		}
		if s.ResourceType != kinds[0] {
			continue // EBS snapshots, of which there are none
		}
		if err := addTags(tags, s.Tag); err != nil {
			return nil, err
		}
	}
	if len(tags) == 0 {
		return nil, nil
	}
	return tags, nil
}

func addTags(tags catalog.Tags, l []tagParam) error {
	for _, t := range l {
		if _, twice := tags[t.Key]; twice {
			return refuse(catalog.CodeParameter, "Duplicate tag key '%.128s' specified.", t.Key)
		}
		tags[t.Key] = ""
		if t.Value != nil {
			tags[t.Key] = *t.Value
		}
	}
	return nil
}

type createTags struct {
	dry
	ResourceID []string   `q:"ResourceId!"`
	Tag        []tagParam `q:"Tag!"`
}

func (s *Server) createTags(ctx context.Context, c *call, in *createTags) (reply, error) {
	tags := catalog.Tags{}
	if err := addTags(tags, in.Tag); err != nil {
		return nil, err
	}
	return done(), s.o.Catalog.SetTags(ctx, c.as(in.DryRun), in.ResourceID, tags)
}

type deleteTags struct {
	dry
	ResourceID []string `q:"ResourceId!"`
	Tag        []tagParam
}

// deleteTags removes tags by key, or by key and value; without any, all.
func (s *Server) deleteTags(ctx context.Context, c *call, in *deleteTags) (reply, error) {
	var remove []catalog.TagMatch
	for _, t := range in.Tag {
		remove = append(remove, catalog.TagMatch{Key: t.Key, Value: t.Value})
	}
	return done(), s.o.Catalog.DeleteTags(ctx, c.as(in.DryRun), in.ResourceID, remove)
}
