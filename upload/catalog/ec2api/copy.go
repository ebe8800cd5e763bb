package ec2api

import (
	"context"

	"github.com/instar-image/instar/upload/catalog"
)

type copyImage struct {
	dry
	Name             string
	SourceImageID    string `q:"SourceImageId!"`
	SourceRegion     string `q:"SourceRegion!"`
	Description      string
	ClientToken      string
	CopyImageTags    bool
	Encrypted        bool
	KmsKeyID         string `q:"KmsKeyId"`
	TagSpecification []tagSpecification
}

func (s *Server) copyImage(ctx context.Context, c *call, in *copyImage) (reply, error) {
	tags, err := tagsOf(in.TagSpecification, "image", "snapshot")
	if err != nil {
		return nil, err
	}
	if in.Encrypted || in.KmsKeyID != "" {
		return nil, refuse(catalog.CodeCombination, "Encrypted and KmsKeyId are for images of EBS snapshots: images here are encrypted as they were made")
	}
	if len(in.ClientToken) > 64 {
		return nil, refuse(catalog.CodeParameterValue, "ClientToken has more than 64 characters")
	}
	source, err := s.source(ctx, in.SourceRegion)
	if err != nil {
		return nil, err
	}
	if source == nil {
		return nil, refuse(catalog.CodeParameterValue, "The source region %.100q is none that this catalog knows", in.SourceRegion)
	}
	if err := s.roomFor(ctx, c.account.id); err != nil {
		return nil, err
	}
	m, err := s.o.Catalog.Copy(ctx, c.as(in.DryRun), catalog.CopyRequest{
		Name: in.Name, Description: in.Description, SourceID: in.SourceImageID, SourceRegion: in.SourceRegion,
		Token: in.ClientToken, CopyTags: in.CopyImageTags, Tags: tags,
	}, source)
	if err != nil {
		return nil, err
	}
	s.begun()
	return &imageIDReply{ImageID: m.ID}, nil
}
