//go:build !linux

package mos_test

import (
	"os"
	"testing"
)

func openPTY(t *testing.T) (*os.File, string) {
	t.Skip("needs pseudo terminals of Linux")
	return nil, ""
}
