package ota_test

import (
	"testing"

	"github.com/slotota/ota"
	"github.com/stretchr/testify/require"
)

// Status asks for findings anew each time.
func TestFindings(t *testing.T) {
	var found []ota.Finding
	r := newRig(t, fileGeometry(), ota.Options{Health: func() []ota.Finding { return found }})
	require.Empty(t, r.dev.Status().Findings)
	found = []ota.Finding{{ID: "x", Severity: ota.Critical, What: "What.", Remedy: "Do."}}
	require.Equal(t, found, r.dev.Status().Findings)
}
