// Prints what kstatus says of objects: one JSON object per line in, one {"status", "message"} per line out.
//
// kstatus is the code by which Flux and Helm 4 decide whether an object is ready.
package main

import (
	"encoding/json"
	"errors"
	"io"
	"log"
	"os"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

func main() {
	if err := judge(os.Stdin, os.Stdout); err != nil {
		log.Fatal(err)
	}
}

func judge(from io.Reader, to io.Writer) error {
	objects, verdicts := json.NewDecoder(from), json.NewEncoder(to)
	for {
		var content map[string]any
		if err := objects.Decode(&content); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		object, err := asClient(content)
		if err != nil {
			return err
		}
		result, err := status.Compute(object)
		if err != nil {
			return err
		}
		verdict := map[string]string{"status": string(result.Status), "message": result.Message}
		if err := verdicts.Encode(verdict); err != nil {
			return err
		}
	}
}

// asClient reads the object as client-go does, whose integers are int64: kstatus compares generations as such.
func asClient(content map[string]any) (*unstructured.Unstructured, error) {
	text, err := json.Marshal(content)
	if err != nil {
		return nil, err
	}
	object := &unstructured.Unstructured{}
	return object, object.UnmarshalJSON(text)
}
