"""Quality of a sparse model beside its dense teacher."""
